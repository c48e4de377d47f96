// The layer, the filter and the token's values. State is in the URL's hash, so a link shows the same.
const { best, layers, truth, codes: packed } = JSON.parse(byId("view").textContent);
const codes = new Uint16Array(unpacked(packed));
const block = byId("tokens"), tokens = [...block.children];
const slider = byId("layer"), errors = byId("errors"), choices = all("[role=radio]");
const UNKNOWN = 0x7fff, YES = 0x8000, DECIMALS = 10000;
const MEANS = {
  tp: "and it is so: a hit", fp: "but it is not: a false alarm", fn: "but it is so: a miss", tn: "and it is not",
  "": "what is so is not known",
};
let layer = best, chosen = null;

const code = (place) => codes[layer * tokens.length + place];
function outcome(place) {
  const value = code(place);
  if (value === UNKNOWN) return "na";
  const yes = value & YES;
  return { 1: yes ? "tp" : "fn", 0: yes ? "fp" : "tn" }[truth[place]] ?? "";
}

function describe(place) {
  const before = tokens[place].previousSibling;  // the blanks of this token, when it is text
  const whole = (before?.nodeType === Node.TEXT_NODE ? before.data : "") + tokens[place].textContent;
  const text = marked(whole) || "⋯";
  const value = code(place), kind = outcome(place), says = value & YES ? "yes" : "no";
  const lines = kind === "na"
    ? [`n/a  ‹${text}›`, "The probe has no value here."]
    : [`${((value & ~YES) / DECIMALS).toFixed(4)}  ‹${text}›`, `Says ${says}, ${MEANS[kind]}.`];
  return [...lines, `${layers[layer].layer}, token ${(place + 1).toLocaleString("en")}`].join("\n");
}
const point = (place) => showTip(tokens[place], describe(place));

// One tab stop for the chart's layers, one for the tokens, or only for the errors when only they are shown.
const isOnly = () => block.classList.contains("only");
const inChart = choices.length ? walkable(choices[0].parentElement, choices, (at) => showTip(choices[at]), {
  arrive: choose, keys: { ArrowUp: (at) => at + 1, ArrowDown: (at) => at - 1 },
}) : null;
const inText = walkable(block, tokens, point, {
  passes: (place) => !isOnly() || ["fp", "fn"].includes(tokens[place].className),
  arrive: (place) => { chosen = place; save(); },
});

function choose(next) {
  layer = Math.max(0, Math.min(next, layers.length - 1));
  for (const place of all("[data-figure]")) place.textContent = layers[layer][place.dataset.figure];
  byId("notch").style.setProperty("--p", layers[layer].threshold);
  if (slider) {
    slider.value = layer;
    slider.setAttribute("aria-valuetext", layers[layer].layer);
  }
  choices.forEach((choice, index) => choice.setAttribute("aria-checked", index === layer));
  inChart?.stopAt(layer);
  tokens.forEach((token, place) => {
    const value = code(place) & ~YES, kind = outcome(place);
    token.style.backgroundColor = value === UNKNOWN ? "" : shade(value / DECIMALS);
    if (token.className !== kind) token.className = kind;  // few new classes: each takes time
  });
  inText.settle();
  const place = tokens.indexOf(pointed);
  if (place >= 0) point(place);  // the tip follows the layer
  save();
}

function only(on) {
  errors.setAttribute("aria-pressed", on);
  block.classList.toggle("only", on);
  inText.settle();
  save();
}

function save() {
  const state = new URLSearchParams({ layer: layers[layer].layer });
  if (chosen !== null) state.set("token", chosen + 1);
  if (isOnly()) state.set("only", "errors");
  remember(state);
}
function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  const found = layers.findIndex((figures) => figures.layer === state.get("layer"));
  only(state.get("only") === "errors");
  choose(found < 0 ? best : found);
  inText.walk(Number(state.get("token")) - 1);
}

slider?.addEventListener("input", () => choose(Number(slider.value)));
document.addEventListener("keydown", (event) => {
  // AltGr, with which some keyboards write brackets, looks like Ctrl and Alt.
  if (event.metaKey || (event.ctrlKey && !event.getModifierState("AltGraph"))) return;
  const step = { "[": -1, "]": 1 }[event.key];
  if (step) choose(layer + step);
});

errors.parentElement.hidden = false;
errors.addEventListener("click", () => only(!isOnly()));

window.addEventListener("hashchange", () => { if (location.hash.includes("layer=")) recall(); });
recall();
