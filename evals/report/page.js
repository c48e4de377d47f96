// Hover and focus values, source filter and copy buttons. The page is complete without it.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const tip = document.getElementById("tip");

function showTip(mark) {
  tip.textContent = mark.getAttribute("aria-label");
  tip.hidden = false;
  const at = mark.getBoundingClientRect(), box = tip.getBoundingClientRect();
  const anchor = mark.querySelector("line.spot")?.getBoundingClientRect() ?? at;
  const left = anchor.left + anchor.width / 2 - box.width / 2;
  const most = document.documentElement.clientWidth - box.width - 8;
  tip.style.left = `${scrollX + Math.max(8, Math.min(left, most))}px`;
  const above = at.top - box.height - 8;
  tip.style.top = `${scrollY + (above > 50 ? above : at.bottom + 8)}px`;
}
const hideTip = () => { tip.hidden = true; };

// One tab stop per chart; arrow keys walk its marks.
for (const svg of all("svg")) {
  svg.querySelector("title").remove();  // else the browser's own tooltip covers ours
  const marks = all("[data-tip]", svg);
  marks.forEach((mark, index) => {
    mark.setAttribute("tabindex", index ? -1 : 0);
    mark.addEventListener("pointerenter", () => showTip(mark));
    mark.addEventListener("pointerleave", hideTip);
    mark.addEventListener("focus", () => showTip(mark));
    mark.addEventListener("blur", hideTip);
    mark.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const next = event.key === "Home" ? 0 : event.key === "End" ? marks.length - 1 : index + step;
      if (event.key === "Escape") hideTip();
      if (!marks[next]) return;
      event.preventDefault();
      mark.setAttribute("tabindex", -1);
      marks[next].setAttribute("tabindex", 0);
      marks[next].focus();
    });
  });
}

// Token scores: the bar at the page's edge follows the pointer and the focus. The title, which says
// the same without this script, is moved aside so that the browser's tooltip does not cover the text.
const readout = document.getElementById("readout");
const visible = { "\n": "↵", "\t": "⇥", " ": "␣", "\u00a0": "⍽" };
function showToken(token) {
  if (token.title) {
    token.dataset.score = token.title;
    token.removeAttribute("title");
  }
  const [position, scores] = token.dataset.score.split(": ");
  const effect = token.classList.contains("helps") ? "helps" : token.classList.contains("hurts") ? "hurts" : "little effect";
  const text = token.textContent.replace(/[\n\t \u00a0]/g, (blank) => visible[blank]);
  const strong = document.createElement("b");
  strong.textContent = `‹${text}›`;
  const facts = [`row ${token.closest("pre").dataset.row}`, `position ${Number(position).toLocaleString("en")}`, `score ${scores}`, effect];
  readout.replaceChildren(strong, ...facts.map((fact) => Object.assign(document.createElement("span"), { textContent: fact })));
  readout.className = token.className;
}
const hideToken = () => readout.replaceChildren();  // never hidden: a reader follows what it knows of

// The nearest token of the line above or below, by where it stands on the screen.
function vertical(tokens, from, down) {
  const middle = (box) => (box.left + box.right) / 2;
  const here = tokens[from].getClientRects()[0];
  let line, best, least = Infinity;
  for (let at = from + down; tokens[at]; at += down) {
    const box = tokens[at].getClientRects()[0];
    if (down * (box.top - here.top) < here.height / 2) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > here.height / 2) break;
    const away = Math.abs(middle(box) - middle(here));
    if (away < least) [best, least] = [at, away];
  }
  return best;
}

for (const block of all("pre.tokens")) {
  const tokens = [...block.children].filter((child) => child.title);
  block.addEventListener("pointerover", (event) => {
    const token = event.target.closest("pre.tokens > span");
    if (token) showToken(token); else hideToken();
  });
  block.addEventListener("pointerleave", () => {
    if (block.contains(document.activeElement)) showToken(document.activeElement); else hideToken();
  });
  block.addEventListener("focusin", (event) => showToken(event.target));
  block.addEventListener("focusout", hideToken);
  const walk = (token) => {
    if (!token) return;
    block.querySelector('[tabindex="0"]')?.setAttribute("tabindex", -1);
    token.tabIndex = 0;
    token.focus();
  };
  block.addEventListener("click", (event) => walk(event.target.closest("pre.tokens > span")));
  block.addEventListener("keydown", (event) => {
    const at = tokens.indexOf(event.target);
    const next = {
      ArrowRight: () => at + 1, ArrowLeft: () => at - 1, Home: () => 0, End: () => tokens.length - 1,
      ArrowDown: () => vertical(tokens, at, 1), ArrowUp: () => vertical(tokens, at, -1),
    }[event.key];
    if (event.key === "Escape") hideToken();
    if (!next || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    walk(tokens[next()]);
  });
}

const items = all(".chunks li");
for (const tools of all(".tools")) tools.hidden = false;
const filters = all(".tools [data-source]");
for (const button of filters) {
  button.addEventListener("click", () => {
    const source = button.dataset.source;
    for (const other of filters) other.setAttribute("aria-pressed", other === button);
    for (const item of items) {
      item.hidden = source ? item.dataset.source !== source : item.className === "extra";
    }
  });
}
const expand = document.getElementById("expand");
expand?.addEventListener("click", () => {
  const open = expand.textContent === "Open all";
  for (const details of all(".chunks details")) details.open = open;
  expand.textContent = open ? "Close all" : "Open all";
});

for (const button of all(".copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
