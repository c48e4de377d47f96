// Hover and focus values, source filter and copy buttons. The page is complete without it.

// One tab stop per chart; arrow keys walk its marks.
for (const svg of all("svg")) {
  svg.querySelector("title").remove();  // else the browser's own tooltip covers ours
  const marks = all("[data-tip]", svg);
  walkable(svg, marks, (at) => showTip(marks[at]), { keys: { ArrowDown: (at) => at + 1, ArrowUp: (at) => at - 1 } });
}

// Token scores: the bar at the page's edge follows the pointer and the focus. The title, which says
// the same without this script, is moved aside so that the browser's tooltip does not cover the text.
const readout = byId("readout");
function showToken(token) {
  if (token.title) {
    token.dataset.score = token.title;
    token.removeAttribute("title");
  }
  const [position, scores] = token.dataset.score.split(": ");
  const effect = token.classList.contains("helps") ? "helps" : token.classList.contains("hurts") ? "hurts" : "little effect";
  const facts = [`row ${token.closest("pre").dataset.row}`, `position ${Number(position).toLocaleString("en")}`, `score ${scores}`, effect];
  readout.replaceChildren(make("b", {}, `‹${marked(token.textContent)}›`), ...facts.map((fact) => make("span", {}, fact)));
  readout.className = token.className;
}
const hideToken = () => readout.replaceChildren();  // never hidden: a reader follows what it knows of

for (const block of all("pre.tokens")) {
  const tokens = [...block.children].filter((child) => child.title);
  const start = tokens.findIndex((token) => token.tabIndex === 0);
  walkable(block, tokens, (at) => showToken(tokens[at]), { hide: hideToken, start });
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideToken(); });

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
const expand = byId("expand");
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
