// What pages of numbers and texts need: words, elements, tips, marks to walk along. It knows no data.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id), tip = byId("tip");

const blanks = { "\n": "↵", "\t": "⇥", " ": "␣", "\u00a0": "⍽" };
const marked = (text) => text.replace(/[\n\t \u00a0]/g, (blank) => blanks[blank]);
const unpacked = (base64) => Uint8Array.from(atob(base64), (byte) => byte.charCodeAt(0)).buffer;
const modified = (event) => event.ctrlKey || event.metaKey || event.altKey;

// The colour of a share from 0 to 1. Plain: variables or mixed colours take the browser five times longer.
const [hue, most] = ["--hue", "--most"].map((name) => getComputedStyle(document.documentElement).getPropertyValue(name));
const shade = (share) => `rgb(${hue} / ${(most * share).toFixed(3)})`;

// Elements are made of texts alone, never of markup.
function make(name, attributes = {}, ...children) {
  const element = name.startsWith("svg:") ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// ------------------------------------------------------------------------------------- tips
// What stays at the window's top would cover a tip.
const roofs = all("header, main > *").filter((part) => getComputedStyle(part).position === "sticky");
let pointed = null;  // the mark that has the tip
function showTip(mark, text = mark.getAttribute("aria-label")) {
  hideTip();
  pointed = mark;
  tip.textContent = text;
  tip.hidden = false;
  if (!mark.hasAttribute("aria-label")) mark.setAttribute("aria-describedby", "tip");
  const box = mark.getClientRects()[0], size = tip.getBoundingClientRect();
  const anchor = mark.querySelector("line.spot")?.getBoundingClientRect() ?? box;
  const left = anchor.left + anchor.width / 2 - size.width / 2, above = box.top - size.height - 8;
  const widest = document.documentElement.clientWidth - size.width - 8;
  const roof = Math.max(0, ...roofs.map((part) => part.getBoundingClientRect().bottom));
  tip.style.left = `${scrollX + Math.max(8, Math.min(left, widest))}px`;
  tip.style.top = `${scrollY + (above > roof ? above : box.bottom + 8)}px`;
}
function hideTip() {
  pointed?.removeAttribute("aria-describedby");
  pointed = null;
  tip.hidden = true;
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

// ------------------------------------------------------------------------------------ walks
// One tab stop for many marks: arrow keys and clicks move it, over marks that `passes` alone. Pointer or
// focus on a mark calls `show` with its place, leaving it `hide`; `arrive` hears where a walk ends.
function walkable(root, marks, show, { hide = hideTip, keys = {}, passes = () => true, arrive = () => {}, start = 0 } = {}) {
  let at;
  const places = new Map(marks.map((mark, place) => [mark, place]));
  const placeOf = (node) => (!node || node === root ? undefined : places.get(node) ?? placeOf(node.parentNode));
  const along = (place, step) => {
    while (marks[place] && !passes(place)) place += step;
    return marks[place] && place;
  };
  // The nearest mark of the line above or below, by where it stands on the screen.
  const vertical = (step) => {
    const middle = (box) => (box.left + box.right) / 2, here = marks[at].getClientRects()[0];
    let line, found, least = Infinity;
    for (let place = along(at + step, step); place !== undefined; place = along(place + step, step)) {
      const box = marks[place].getClientRects()[0];
      if (!box || step * (box.top - here.top) < here.height / 2) continue;
      line ??= box.top;
      if (Math.abs(box.top - line) > here.height / 2) break;
      const away = Math.abs(middle(box) - middle(here));
      if (away < least) [found, least] = [place, away];
    }
    return found;
  };
  const stopAt = (place) => {
    if (place === at) return;  // a mark without its stop, if but for a moment, loses the focus
    marks[at]?.removeAttribute("tabindex");
    at = place;
    marks[at]?.setAttribute("tabindex", 0);
  };
  const walk = (place) => {
    if (!marks[place]) return;
    stopAt(place);
    marks[at].focus();
    arrive(at);
  };
  const rest = () => { if (document.activeElement === marks[at]) show(at); else hide(); };
  const ways = {
    ArrowRight: () => along(at + 1, 1), ArrowLeft: () => along(at - 1, -1), ArrowDown: () => vertical(1), ArrowUp: () => vertical(-1),
    Home: () => along(0, 1), End: () => along(marks.length - 1, -1), ...keys,
  };
  root.addEventListener("pointerover", (event) => {
    const place = placeOf(event.target);
    if (place !== undefined) show(place);
    else if (root.matches("svg")) rest();  // in a text, gaps are only the blanks between its tokens
  });
  root.addEventListener("pointerleave", rest);
  root.addEventListener("focusin", (event) => { if (event.target === marks[at]) show(at); });
  root.addEventListener("focusout", hide);
  root.addEventListener("click", (event) => walk(placeOf(event.target)));
  root.addEventListener("keydown", (event) => {
    if (!ways[event.key] || modified(event)) return;
    event.preventDefault();
    walk(ways[event.key](at));
  });
  if (root.matches("svg")) root.setAttribute("tabindex", -1);  // one that hears of focus would be a tab stop
  for (const mark of marks) mark.removeAttribute("tabindex");
  stopAt(start);
  // Tab must lead to a mark that passes; the one with the focus keeps it.
  const settle = () => { if (document.activeElement !== marks[at]) stopAt(along(at, 1) ?? along(at, -1) ?? at); };
  return { walk, stopAt, settle };
}

// Browsers refuse a page that rewrites its address too often: once a pause is enough.
let saving;
function remember(state) {
  clearTimeout(saving);
  saving = setTimeout(() => { if (location.hash !== `#${state}`) history.replaceState(null, "", `#${state}`); }, 150);
}
