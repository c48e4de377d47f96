// The layer, the filter and the token's values. State is in the URL's hash, so a link shows the same.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);
const { best, layers, truth, codes: packed } = JSON.parse(byId("view").textContent);
const codes = new Uint16Array(Uint8Array.from(atob(packed), (byte) => byte.charCodeAt(0)).buffer);
const block = byId("tokens"), tokens = [...block.children];
const slider = byId("layer"), tip = byId("tip"), errors = byId("errors"), choices = all("[role=radio]");
const UNKNOWN = 0x7fff, YES = 0x8000, DECIMALS = 10000;
const MEANS = {
  tp: "and it is so: a hit", fp: "but it is not: a false alarm", fn: "but it is so: a miss", tn: "and it is not",
  "": "what is so is not known",
};
const [hue, most] = ["--hue", "--most"].map((name) => getComputedStyle(block).getPropertyValue(name));
let layer = best, at = 0, chosen = null, pointed = null;

const code = (place) => codes[layer * tokens.length + place];
function outcome(place) {
  const value = code(place);
  if (value === UNKNOWN) return "na";
  const yes = value & YES;
  return { 1: yes ? "tp" : "fn", 0: yes ? "fp" : "tn" }[truth[place]] ?? "";
}

function describe(place) {
  const visible = { "\n": "↵", "\t": "⇥", " ": "␣", "\u00a0": "⍽" };
  const before = tokens[place].previousSibling;  // the blanks of this token, when it is text
  const whole = (before?.nodeType === Node.TEXT_NODE ? before.data : "") + tokens[place].textContent;
  const text = whole.replace(/[\n\t \u00a0]/g, (blank) => visible[blank]) || "⋯";
  const value = code(place), kind = outcome(place), says = value & YES ? "yes" : "no";
  const lines = kind === "na"
    ? [`n/a  ‹${text}›`, "The probe has no value here."]
    : [`${((value & ~YES) / DECIMALS).toFixed(4)}  ‹${text}›`, `Says ${says}, ${MEANS[kind]}.`];
  return [...lines, `${layers[layer].layer}, token ${(place + 1).toLocaleString("en")}`].join("\n");
}

function showTip(mark, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = mark.getClientRects()[0], size = tip.getBoundingClientRect();
  const most = document.documentElement.clientWidth - size.width - 8;
  tip.style.left = `${scrollX + Math.max(8, Math.min(box.left + box.width / 2 - size.width / 2, most))}px`;
  const above = box.top - size.height - 8;
  tip.style.top = `${scrollY + (above > byId("bar").getBoundingClientRect().bottom ? above : box.bottom + 8)}px`;
}
const hideTip = () => { pointed = null; tip.hidden = true; };
function point(place) {
  pointed = place;
  showTip(tokens[place], describe(place));
}

function choose(next) {
  layer = Math.max(0, Math.min(next, layers.length - 1));
  for (const place of all("[data-figure]")) place.textContent = layers[layer][place.dataset.figure];
  byId("notch").style.setProperty("--p", layers[layer].threshold);
  if (slider) {
    slider.value = layer;
    slider.setAttribute("aria-valuetext", layers[layer].layer);
  }
  choices.forEach((choice, index) => {
    choice.setAttribute("aria-checked", index === layer);
    choice.setAttribute("tabindex", index === layer ? 0 : -1);
  });
  // Plain colours and few new classes: variables or mixed colours take the browser five times longer.
  tokens.forEach((token, place) => {
    const value = code(place) & ~YES, kind = outcome(place);
    token.style.backgroundColor = value === UNKNOWN ? "" : `rgb(${hue} / ${(most * value / DECIMALS).toFixed(3)})`;
    if (token.className !== kind) token.className = kind;
  });
  settle();
  if (pointed !== null) point(pointed);
  remember();
}

function only(on) {
  errors.setAttribute("aria-pressed", on);
  block.classList.toggle("only", on);
  settle();
  remember();
}
const isOnly = () => block.classList.contains("only");

// Browsers refuse a page that rewrites its address too often: once a pause is enough.
let saving;
function remember() {
  clearTimeout(saving);
  saving = setTimeout(() => {
    const state = new URLSearchParams({ layer: layers[layer].layer });
    if (chosen !== null) state.set("token", chosen + 1);
    if (isOnly()) state.set("only", "errors");
    history.replaceState(null, "", `#${state}`);
  }, 150);
}
function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  const found = layers.findIndex((figures) => figures.layer === state.get("layer"));
  only(state.get("only") === "errors");
  choose(found < 0 ? best : found);
  const token = Number(state.get("token")) - 1;
  if (tokens[token]) walk(token);
}

slider?.addEventListener("input", () => choose(Number(slider.value)));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
  // AltGr, with which some keyboards write brackets, looks like Ctrl and Alt.
  if (event.metaKey || (event.ctrlKey && !event.getModifierState("AltGraph"))) return;
  const step = { "[": -1, "]": 1 }[event.key];
  if (step) choose(layer + step);
});

choices.forEach((choice, index) => {
  const show = () => showTip(choice, choice.getAttribute("aria-label"));
  choice.addEventListener("pointerenter", show);
  choice.addEventListener("pointerleave", hideTip);
  choice.addEventListener("focus", show);
  choice.addEventListener("blur", hideTip);
  choice.addEventListener("click", () => choose(index));
});
choices[0]?.parentElement.addEventListener("keydown", (event) => {
  const next = {
    ArrowRight: layer + 1, ArrowUp: layer + 1, ArrowLeft: layer - 1, ArrowDown: layer - 1, Home: 0, End: layers.length - 1,
  }[event.key];
  if (next === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  choose(next);
  choices[layer].focus();
});

errors.parentElement.hidden = false;
errors.addEventListener("click", () => only(!isOnly()));

// One tab stop; arrow keys walk the tokens, or only the errors when only they are shown.
const walkable = (place) => tokens[place] && (!isOnly() || ["fp", "fn"].includes(tokens[place].className));
function along(from, step) {
  let place = from;
  while (tokens[place] && !walkable(place)) place += step;
  return tokens[place] ? place : null;
}
function vertical(down) {
  const middle = (box) => (box.left + box.right) / 2, here = tokens[at].getClientRects()[0];
  let line, found = null, least = Infinity;
  for (let place = at + down; tokens[place]; place += down) {
    if (!walkable(place)) continue;
    const box = tokens[place].getClientRects()[0];
    if (!box || down * (box.top - here.top) < here.height / 2) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > here.height / 2) break;
    const away = Math.abs(middle(box) - middle(here));
    if (away < least) [found, least] = [place, away];
  }
  return found;
}
function stopAt(place) {
  for (const name of ["tabindex", "aria-describedby"]) tokens[at]?.removeAttribute(name);
  at = place;
  tokens[at]?.setAttribute("tabindex", 0);
  tokens[at]?.setAttribute("aria-describedby", "tip");
}
// Tab must lead to a token that is shown; the one with the focus keeps it.
function settle() {
  if (document.activeElement !== tokens[at]) stopAt(along(at, 1) ?? along(at, -1) ?? at);
}
function walk(place) {
  if (place === null) return;
  stopAt(place);
  chosen = place;
  tokens[at].focus();
  remember();
}
const placeOf = (node) => tokens.indexOf(node.closest("#tokens > span"));
block.addEventListener("pointerover", (event) => {
  const place = placeOf(event.target);
  if (place >= 0) point(place);
});
block.addEventListener("pointerleave", () => {
  if (document.activeElement === tokens[at]) point(at); else hideTip();
});
block.addEventListener("focusin", () => point(at));
block.addEventListener("focusout", hideTip);
block.addEventListener("click", (event) => { if (placeOf(event.target) >= 0) walk(placeOf(event.target)); });
block.addEventListener("keydown", (event) => {
  const next = {
    ArrowRight: () => along(at + 1, 1), ArrowLeft: () => along(at - 1, -1), ArrowDown: () => vertical(1),
    ArrowUp: () => vertical(-1), Home: () => along(0, 1), End: () => along(tokens.length - 1, -1),
  }[event.key];
  if (!next || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  walk(next());
});

window.addEventListener("hashchange", () => { if (location.hash.includes("layer=")) recall(); });
recall();
