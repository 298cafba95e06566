// What the console's pages do beside django-unfold's own scripts. Pages hold no script: the policy of content forbids it.
"use strict";

// A button or link that asks first: data-confirm="Revoke this key?"
document.addEventListener(
  "click",
  (event) => {
    const asked = event.target.closest("[data-confirm]");
    if (asked && !confirm(asked.dataset.confirm)) {
      event.preventDefault();
      event.stopImmediatePropagation();
    }
  },
  true,
);

// A button that copies an element's text: data-copy="its id"
document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  const source = button && document.getElementById(button.dataset.copy);
  if (!source) return;
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
  } catch {  // no clipboard without HTTPS: select it for Ctrl-C
    getSelection().selectAllChildren(source);
    button.textContent = "Press Ctrl-C";
  }
});

// A page that was the answer to a form: to load it again would be to send the form again, and issue another key.
document.addEventListener("DOMContentLoaded", () => {
  const page = document.querySelector("[data-address]");
  if (page) history.replaceState(null, "", page.dataset.address);
});
