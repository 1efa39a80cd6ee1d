// Runs before the first paint, so that a page in chosen colours never flashes in the others.
try {
  const theme = JSON.parse(localStorage.getItem("nanomolmo2.settings") ?? "{}").theme;
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage may be blocked or hold something else: the system's colours it is.
}
