(function () {
  try {
    var kept = localStorage.getItem("rlhf-doctor-theme");
    if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
  } catch (refused) { /* a page from a file may have no storage: the system's theme stays */ }
})();
