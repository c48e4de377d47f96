// The list, the search and one feature. The feature is in the URL's hash, so a link shows the same.
const data = JSON.parse(byId("view").textContent);
const whole = (packed) => new Uint32Array(unpacked(packed)), real = (packed) => new Float32Array(unpacked(packed));
const { tokens, table, nearest, bins, window: around } = data, NO_TEXT = 0xffffffff;
const active = whole(data.active), max = real(data.max), mean = real(data.mean), features = active.length;
const weight = data.weight && real(data.weight), density = Float64Array.from(active, (count) => count / tokens);
const columns = { id: active.map((_, feature) => feature), density, max, mean, weight };
const effects = data.effects && {
  ends: data.effects.ends,
  ...Object.fromEntries(["up", "down"].map((end) => [end, { text: whole(data.effects[end][0]), value: real(data.effects[end][1]) }])),
};
const near = whole(data.near), cosine = real(data.cosine), histogram = whole(data.histogram);
const rows = new Int32Array(unpacked(data.row)), places = whole(data.place), texts = whole(data.text), values = real(data.value);
const detailed = new Map([...whole(data.detailed)].map((feature, index) => [feature, index]));
const shown = new Map([...whole(data.shown)].map((feature, index) => [feature, index]));
const kept = data.shelves.reduce((sum, [size]) => sum + size, 0), middle = (around - 1) / 2;
const list = byId("list"), sheet = byId("sheet"), search = byId("search"), only = byId("only");
const article = byId("feature"), heads = all("[data-sort]");

// ------------------------------------------------------------------------------------ list
let order = columns.id, sort = weight ? "weight" : "max", up = false, current = null, rowHeight = 0;

// By the chosen column; before all, the feature whose number is searched.
function ordered(features, id) {
  const by = columns[sort];
  return Uint32Array.from(features).sort((a, b) => (b === id) - (a === id) || (up ? by[a] - by[b] : by[b] - by[a]) || a - b);
}
const lowered = table.map((text) => text.toLowerCase());
const written = new Map();  // text of a feature's contexts, joined, made when it is first searched
function textOf(feature) {
  if (!written.has(feature)) {
    const first = shown.get(feature) * kept * around;
    let text = "";
    for (let at = 0; at < kept * around; at++) {
      if (at % around === 0) text += "\0";
      if (texts[first + at] !== NO_TEXT) text += lowered[texts[first + at]].replace(/⋯$/, "");  // half a character
    }
    written.set(feature, text);
  }
  return written.get(feature);
}
const asked = () => (/^\s*[#f]?\d+\s*$/.test(search.value) ? Number(search.value.replace(/\D/g, "")) : null);
function matching(id) {
  const wanted = search.value.toLowerCase().replace(/[↵⇥␣⍽]/g, (mark) => ({ "↵": "\n", "⇥": "\t", "␣": " ", "⍽": "\u00a0" })[mark]);
  const known = isOnly() ? [...shown.keys()] : [...columns.id];
  if (!wanted.trim()) return known;
  const has = lowered.map((text) => text.includes(wanted));
  return known.filter((feature) => {
    if (feature === id) return true;
    if (effects && detailed.has(feature)) {
      const first = detailed.get(feature) * effects.ends;
      for (let at = first; at < first + effects.ends; at++) if (has[effects.up.text[at]]) return true;
    }
    return shown.has(feature) && textOf(feature).includes(wanted);
  });
}
function refresh() {
  const id = asked();
  order = ordered(matching(id), id);
  byId("found").textContent = order.length === features ? counted(features, "feature")
    : `${order.length.toLocaleString("en")} of ${counted(features, "feature")}`;
  for (const head of heads) {
    const isIt = head.dataset.sort === sort;
    head.setAttribute("aria-pressed", isIt);
    head.dataset.way = isIt ? (up ? "up" : "down") : "";
  }
  list.scrollTop = 0;
  show();
}
const isOnly = () => only.getAttribute("aria-pressed") === "true";

const formats = { id: (feature) => `#${feature}`, density: percent, max: number, mean: number, weight: (value) => signed(value, 2) };
function item(feature, index) {
  const row = make("div", {
    role: "option", id: `o${feature}`, "aria-selected": feature === current, "aria-posinset": index + 1,
    "aria-setsize": order.length, class: shown.has(feature) ? "" : "bare", style: `top: ${index * rowHeight}px`,
  });
  for (const head of heads) {
    const name = head.dataset.sort, isDead = !active[feature] && ["max", "mean"].includes(name);
    row.append(make("span", {}, isDead ? "–" : formats[name](columns[name][feature])));
  }
  row.append(make("small", {}, ...label(feature, 5)));
  return row;
}
function label(feature, most) {
  if (!effects || !detailed.has(feature)) return [];
  const first = detailed.get(feature) * effects.ends;
  return Array.from(effects.up.text.slice(first, first + most), (text) => token(table[text]));
}
function show() {
  if (!rowHeight) {
    sheet.append(make("div", { role: "option" }, make("span", {}, "0"), make("small", {}, "0")));
    rowHeight = sheet.firstChild.offsetHeight;
  }
  sheet.style.height = `${order.length * rowHeight}px`;
  const first = Math.max(0, Math.floor(list.scrollTop / rowHeight) - 3);
  const last = Math.min(order.length, Math.ceil((list.scrollTop + list.clientHeight) / rowHeight) + 3);
  sheet.replaceChildren(...Array.from(order.slice(first, last), (feature, index) => item(feature, first + index)));
  if (byId(`o${current}`)) list.setAttribute("aria-activedescendant", `o${current}`);
  else list.removeAttribute("aria-activedescendant");
}
function reveal() {
  const index = order.indexOf(current);
  if (index < 0) return;
  const above = index * rowHeight, below = above + rowHeight - list.clientHeight;
  if (list.scrollTop > above) list.scrollTop = above;
  if (list.scrollTop < below) list.scrollTop = below;
}

// --------------------------------------------------------------------------------- feature
function choose(feature) {
  if (feature === current) return;
  current = feature;
  hideTip();
  article.replaceChildren(...parts(feature));
  if (article.getBoundingClientRect().top < 0) article.scrollIntoView();
  reveal();
  show();
  remember(`f${feature}`);
}
function parts(feature) {
  const found = [
    make("button", { type: "button", class: "back" }, "Back to the list"),
    make("h2", { id: "name" }, `Feature ${feature}`), figures(feature),
  ];
  found[0].addEventListener("click", () => { search.focus(); byId("panes").scrollIntoView(); });
  if (!active[feature]) found.push(make("p", {}, `Not active on any of the ${counted(tokens, "token")}.`));
  const index = shown.get(feature);
  if (index !== undefined) found.push(spread(feature, index));
  if (detailed.has(feature)) found.push(writes(detailed.get(feature)));
  if (index !== undefined) found.push(contexts(feature, index));
  else if (active[feature]) {
    found.push(make("p", { class: "hint" }, "The page has contexts of ", counted(shown.size, "feature"), " only. Make it again with ",
      make("code", {}, `--feature ${feature}`), " for those of this one."));
  }
  return found;
}
function figures(feature) {
  const facts = [
    ["Density", percent(density[feature]), "of the tokens"],
    ["Active tokens", active[feature].toLocaleString("en"), `of ${tokens.toLocaleString("en")}`],
  ];
  if (active[feature]) facts.push(["Max", number(max[feature], 4), ""], ["Mean", number(mean[feature], 4), "where active"]);
  if (weight) {
    const side = weight[feature] > 0 ? "raises a row's score" : weight[feature] < 0 ? "lowers a row's score" : "not used";
    facts.push(["Classifier weight", signed(weight[feature]), side]);
  }
  return make("dl", { class: "figures" }, ...facts.map(([name, value, note]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, make("b", {}, value), make("small", {}, note)))));
}

function spread(feature, index) {
  const counts = Array.from(histogram.slice(index * bins, (index + 1) * bins)), step = max[feature] / bins;
  const tell = (bin, count) => `${number(bin * step)} to ${number((bin + 1) * step)}\n${counted(count, "token")}`;
  const ticks = rounds(max[feature]).map((value) => [value / max[feature], number(value, 2)]);
  return make("figure", { class: "spread" }, bars(counts, tell, ticks, "Activation; counts of tokens are logarithmic"));
}

function writes(index) {
  const found = [];
  if (effects) {
    const largest = Math.max(...["up", "down"].map((end) => Math.abs(effects[end].value[index * effects.ends])));
    for (const [end, title] of [["up", "Promotes"], ["down", "Suppresses"]]) {
      const lines = make("ol", { class: `ends ${end}` });
      for (let at = index * effects.ends; at < (index + 1) * effects.ends; at++) {
        const value = effects[end].value[at];
        lines.append(make("li", { style: `--share: ${(100 * Math.abs(value) / largest).toFixed(1)}%` },
          token(table[effects[end].text[at]]), make("span", {}, signed(value))));
      }
      found.push(make("div", {}, make("h3", {}, title), lines));
    }
  }
  const lines = make("ol", { class: "ends near" });
  for (let at = index * nearest; at < (index + 1) * nearest; at++) {
    lines.append(make("li", { style: `--share: ${(100 * Math.max(0, cosine[at])).toFixed(1)}%` },
      make("a", { href: `#f${near[at]}` }, `#${near[at]}`), make("small", {}, ...label(near[at], 3)), make("span", {}, number(cosine[at]))));
  }
  found.push(make("div", {}, make("h3", {}, "Nearest features"), lines));
  const note = effects ? "Output tokens: direct effect of one unit of the feature on the logits, through the gain of the final norm "
    + "alone. Later layers, and the size that the norm divides by, are left out. " : "Output tokens are not defined here: the SAE does "
    + "not write to the residual stream. ";
  return make("section", { class: "writes" }, make("div", { class: "columns" }, ...found),
    make("p", { class: "note" }, note, "Nearest: cosine of decoder directions."));
}

// Strongest tokens stand in one line below each other, what is before them to the left.
function contexts(feature, index) {
  const sections = [], walk = { marks: [], tells: [], lines: [], peaks: [] }, largest = number(max[feature]);
  let slot = index * kept;
  for (const [size, percents] of data.shelves) {
    const found = make("ol", { class: "contexts" });
    for (const end = slot + size; slot < end; slot++) if (rows[slot] >= 0) found.append(context(feature, slot, walk));
    if (!found.children.length) continue;
    const from = percents && (percents[0] ? `At ${percents[0]}%` : "Up");
    const title = percents ? `${from} to ${percents[1]}% of the largest` : `Strongest in ${counted(found.children.length, "row")}`;
    const scale = make("span", { class: "scale", role: "img", "aria-label": `colours from 0 to ${largest}` });
    const legend = percents ? [] : [make("span", { class: "legend" }, "0", scale, largest)];
    sections.push(make("section", {}, make("div", { class: "line" }, make("h3", {}, title), ...legend), found));
  }
  const group = make("div", { role: "group", "aria-label": "Contexts; arrow keys walk the tokens" }, ...sections);
  const line = (way) => (at) => walk.peaks[walk.lines[at] + way] ?? at;
  const keys = { ArrowDown: line(1), ArrowUp: line(-1) };
  walkable(group, walk.marks, (at) => showTip(walk.marks[at], walk.tells[at]()), { keys, start: walk.peaks[0] });
  return group;
}
function context(feature, slot, walk) {
  const [before, after] = [0, 1].map(() => make("p", { class: "tokens shaded", dir: "auto" })), line = walk.peaks.length;
  for (let at = 0; at < around; at++) {
    const text = texts[slot * around + at], value = values[slot * around + at];
    if (text === NO_TEXT) continue;
    const mark = token(table[text]), counts = !Number.isNaN(value);
    if (value > 0) mark.style.backgroundColor = shade(value / max[feature]);
    if (!counts) mark.classList.add("na");
    if (at === middle) {
      mark.classList.add("peak");
      walk.peaks.push(walk.marks.length);
    }
    walk.marks.push(mark);
    walk.lines.push(line);
    walk.tells.push(() => [
      `${counts ? number(value, 5) : "n/a"}  ‹${marked(table[text])}›`,
      counts ? `${percent(value / max[feature])} of the largest` : "It begins the row and does not count.",
      `row ${rows[slot].toLocaleString("en")}, token ${(places[slot] + at - middle).toLocaleString("en")}`,
    ].join("\n"));
    (at < middle ? before : after).append(mark);
  }
  return make("li", {}, make("b", {}, number(values[slot * around + middle])), before, after);
}

// ------------------------------------------------------------------------------ what is asked
const phone = matchMedia("(max-width: 60rem)");
list.addEventListener("scroll", show);
addEventListener("resize", () => { rowHeight = 0; show(); });
list.addEventListener("click", (event) => {
  const row = event.target.closest("[role=option]");
  if (!row) return;
  choose(Number(row.id.slice(1)));
  if (phone.matches) article.scrollIntoView();
});
list.addEventListener("keydown", (event) => {
  if (modified(event)) return;
  if (event.key === "Enter" && current !== null) { event.preventDefault(); article.focus(); return; }
  const here = order.indexOf(current), page = Math.max(1, Math.floor(list.clientHeight / rowHeight) - 1);
  const next = {
    ArrowDown: here + 1, ArrowUp: here - 1, PageDown: here + page, PageUp: here - page, Home: 0, End: order.length - 1,
  }[event.key];
  if (next === undefined || !order.length) return;
  event.preventDefault();
  choose(order[Math.max(0, Math.min(next, order.length - 1))]);
  byId(`o${current}`)?.scrollIntoView({ block: "nearest" });
});
let typing;
search.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(refresh, features > 5000 ? 120 : 0); });
search.addEventListener("keydown", (event) => {
  if (!["Enter", "ArrowDown"].includes(event.key)) return;
  event.preventDefault();
  clearTimeout(typing);
  refresh();
  if (order.length) { choose(order[0]); list.focus(); }
});
only.addEventListener("click", () => { only.setAttribute("aria-pressed", !isOnly()); refresh(); });
for (const head of heads) {
  head.addEventListener("click", () => {
    up = head.dataset.sort === sort ? !up : head.dataset.sort === "id";
    sort = head.dataset.sort;
    refresh();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || modified(event) || event.target === search) return;
  event.preventDefault();
  search.select();
});

function recall() {
  const feature = Number(/^#f(\d+)$/.exec(location.hash)?.[1] ?? NaN);
  if (feature < features) choose(feature);
  return feature < features;
}
addEventListener("hashchange", recall);

function densities() {
  const logs = Array.from(density).filter((share) => share > 0).map((share) => Math.log10(share));
  if (!logs.length) return;
  const low = Math.floor(logs.reduce((least, log) => Math.min(least, log), -1)), count = -low * 8;
  const counts = new Array(count).fill(0);
  for (const log of logs) counts[Math.min(count - 1, Math.floor((log - low) / -low * count))] += 1;
  const share = (bin) => percent(10 ** (low - low * bin / count));
  const step = low < -4 ? 2 : 1;  // small shares have long names
  const ticks = Array.from({ length: Math.floor(-low / step) + 1 }, (_, place) => {
    const decade = place * step;
    return [1 - decade / -low, `${(10 ** (2 - decade)).toFixed(Math.max(0, decade - 2))}%`];
  });
  const chart = bars(counts, (bin, n) => `${share(bin)} to ${share(bin + 1)} of the tokens\n${counted(n, "feature")}`, ticks,
    "Density; counts of features are logarithmic", [460, 150]);
  byId("densities").append(chart);
  byId("densities").hidden = false;
}
byId("panes").hidden = false;
densities();
refresh();
if (!recall()) choose(order.find((feature) => shown.has(feature)) ?? order[0]);
