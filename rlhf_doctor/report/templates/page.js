(function () {
  "use strict";
  var root = document.documentElement;
  var all = function (selector, from) { return Array.prototype.slice.call((from || document).querySelectorAll(selector)); };
  var one = function (id) { return document.getElementById(id); };
  var say = function (words) { one("said").textContent = words; };

  // Theme: the system's, until the button says otherwise.
  var toggle = one("theme");
  var system = matchMedia("(prefers-color-scheme: dark)");
  var dark = function () { return root.dataset.theme ? root.dataset.theme === "dark" : system.matches; };
  var label = function () { toggle.textContent = dark() ? "Light theme" : "Dark theme"; };
  toggle.hidden = false;
  label();
  system.addEventListener("change", label);
  toggle.addEventListener("click", function () {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("rlhf-doctor-theme", root.dataset.theme); } catch (refused) { /* not kept, that is all */ }
    label();
  });

  // Copying.
  var copy = function (text, button) {
    var before = button.textContent;
    var done = function () {
      button.textContent = "Copied";
      say("Copied");
      setTimeout(function () { button.textContent = before; }, 1500);
    };
    var byHand = function () {
      var area = document.createElement("textarea");
      area.value = text;
      document.body.appendChild(area);
      area.select();
      var copied = document.execCommand("copy");
      area.remove();
      button.focus();
      if (copied) done(); else say("Copying is not allowed here");
    };
    if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, byHand); else byHand();
  };
  all("[data-copy]").forEach(function (button) {
    button.hidden = false;
    button.addEventListener("click", function () { copy(button.parentNode.querySelector("code").textContent, button); });
  });
  one("whole").hidden = false;
  all("[data-copies]").forEach(function (button) {
    button.addEventListener("click", function () { copy(one(button.dataset.copies).textContent, button); });
  });

  // Links into folded parts unfold them.
  var reveal = function () {
    var name = "";
    try { name = decodeURIComponent(location.hash.slice(1)); } catch (broken) { return; }
    var target = name && one(name);
    if (!target) return;
    if (target.closest(".finding[hidden]") && one("filter")) { one("filter").reset(); }
    for (var at = target.parentElement; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    if (target.hasAttribute("tabindex")) { target.focus({ preventScroll: true }); }
    target.scrollIntoView();
  };
  addEventListener("hashchange", reveal);

  // Print: everything unfolded, and folded again afterwards.
  var folded = [];
  addEventListener("beforeprint", function () {
    folded = all("details:not([open])");
    folded.forEach(function (details) { details.open = true; });
  });
  addEventListener("afterprint", function () {
    folded.forEach(function (details) { details.open = false; });
    folded = [];
  });

  // Filter.
  var form = one("filter");
  if (form) {
    var findings = all(".finding");
    var texts = findings.map(function (finding) { return finding.querySelector(".own").textContent.toLowerCase(); });
    var filter = function () {
      var words = one("words").value.toLowerCase().split(/\s+/).filter(Boolean);
      var role = one("role").value;
      var severities = all("input[name=severity]:checked", form).map(function (box) { return box.value; });
      var found = 0;
      var matches = findings.map(function (finding, index) {
        var match = (!role || finding.dataset.role === role)
          && severities.indexOf(finding.dataset.severity) >= 0
          && words.every(function (word) { return texts[index].indexOf(word) >= 0; });
        if (match) found += 1;
        return match;
      });
      findings.forEach(function (finding, index) {
        // A cause stays in sight, though without its own text, where only what follows from it matches.
        var below = findings.some(function (other, at) { return matches[at] && other !== finding && finding.contains(other); });
        finding.hidden = !matches[index] && !below;
        finding.classList.toggle("context", !matches[index] && below);
        var follows = finding.querySelector(".follows");
        if (follows && below && found < findings.length) follows.open = true;
      });
      ["findings", "normal"].forEach(function (id) {
        var section = one(id);
        if (section) section.hidden = !all(".finding", section).some(function (finding) { return !finding.hidden; });
      });
      one("count").textContent = found + " of " + findings.length + " findings shown";
    };
    form.hidden = false;
    form.addEventListener("input", filter);
    form.addEventListener("submit", function (event) { event.preventDefault(); });
    form.addEventListener("reset", function () { setTimeout(filter, 0); });
    filter();
  }
  reveal();
})();
