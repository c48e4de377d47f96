// The button that turns light to dark and back, remembered.
{
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
}
