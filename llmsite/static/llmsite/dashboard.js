// The dashboard shows itself anew every some seconds, while somebody can see it. What comes is our own page's HTML.
"use strict";
(() => {
  const board = document.querySelector("[data-refresh]");
  if (!board) return;
  const seconds = Number(board.dataset.refreshSeconds);
  let timer = 0;

  function plan(after) {
    clearTimeout(timer);
    timer = setTimeout(refresh, after * 1000);
  }

  async function refresh() {
    if (document.hidden) return; // whoever comes back asks again
    try {
      const answer = await fetch(board.dataset.refresh + location.search, { headers: { "X-Requested-With": "fetch" } });
      if (answer.redirected) return location.reload(); // signed out meanwhile
      if (!answer.ok) throw new Error(answer.statusText);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      if (!board.contains(document.activeElement)) board.replaceChildren(...page.body.childNodes);
      board.classList.remove("console-stale");
    } catch {
      board.classList.add("console-stale");
    }
    plan(seconds);
  }

  document.addEventListener("visibilitychange", () => document.hidden ? clearTimeout(timer) : refresh());
  plan(seconds);
})();
