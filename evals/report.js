// Hover and focus values, source filter, theme and copy buttons. The page is complete without it.
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

const theme = document.getElementById("theme"), root = document.documentElement;
const isDark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const label = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
try { const saved = localStorage.getItem("taproot-theme"); if (saved) root.dataset.theme = saved; } catch { /* private mode */ }
theme.hidden = false;
label();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
theme.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("taproot-theme", root.dataset.theme); } catch { /* private mode */ }
  label();
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
