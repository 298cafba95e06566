// What goes on in the background: its part of a page shows itself anew; a chosen file is sent to where it belongs.
"use strict";
(() => {
  const EVERY_SECONDS = 1;
  const MOST_TRIES = 5;
  class SignedOut extends Error {}
  const sleep = (seconds) => new Promise((done) => setTimeout(done, seconds * 1000));

  // The state of it, as the server words it. It replaces the element; null where it cannot be had.
  async function refreshed(box) {
    const answer = await fetch(box.dataset.state, { headers: { "X-Requested-With": "fetch" } });
    if (answer.redirected) throw new SignedOut();
    if (!answer.ok) return null;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const fresh = page.body.firstElementChild;
    box.replaceWith(fresh);
    return fresh;
  }

  async function follow(box) {
    while (box && "open" in box.dataset) {
      await sleep(EVERY_SECONDS);
      if (document.hidden) continue; // whoever comes back sees it then
      try {
        const fresh = await refreshed(box);
        if (!fresh) return;
        if (!("open" in fresh.dataset)) return location.reload(); // what else the page says has changed with it
        box = fresh;
      } catch (error) {
        if (error instanceof SignedOut) return location.reload(); // to the sign-in, and back here
        await sleep(EVERY_SECONDS); // the site is away for a moment
      }
    }
  }

  // One request with the rest of the file; resolves to its status, 0 where the connection broke.
  function send(upload, file, start, onProgress) {
    return new Promise((done) => {
      const request = new XMLHttpRequest();
      request.open("PUT", upload.dataset.upload);
      request.setRequestHeader("X-Upload-Token", upload.dataset.token);
      request.setRequestHeader("Content-Type", "application/octet-stream");
      if (start > 0) request.setRequestHeader("Content-Range", `bytes ${start}-${file.size - 1}/${file.size}`);
      request.upload.addEventListener("progress", (event) => onProgress(start + event.loaded));
      request.addEventListener("load", () => done({ status: request.status, text: request.responseText }));
      request.addEventListener("error", () => done({ status: 0, text: "" }));
      request.send(start > 0 ? file.slice(start) : file);
    });
  }

  function wordsOf(answer) {
    try {
      return JSON.parse(answer.text).message;
    } catch {
      return `The server answered ${answer.status}.`;
    }
  }

  // Where to go on: after what is there, if it is of this very file.
  async function startOf(upload, file) {
    const name = `import-${upload.dataset.importId}`;
    const mark = `${file.name}:${file.size}:${file.lastModified}`;
    const isSame = localStorage.getItem(name) === mark;
    localStorage.setItem(name, mark);
    const box = document.querySelector("[data-state]");
    const fresh = box && (await refreshed(box).catch((error) => {
      if (!(error instanceof SignedOut)) throw error;
      return null; // the page's token is good for hours: the file comes from its beginning
    }));
    const received = fresh ? Number(fresh.dataset.received) : 0;
    return isSame && received < file.size ? received : 0;
  }

  // Whether another try may find it otherwise: for a while the server still holds what came by a connection that broke.
  function mayPass({ status }) {
    const box = document.querySelector("[data-state]");
    return status === 0 || status === 408 || status >= 500 || (status === 409 && box !== null && "open" in box.dataset);
  }

  async function uploadFile(upload) {
    const file = upload.querySelector("input[type=file]").files[0];
    const [button, bar, words] = ["button", "progress", "[role=status]"].map((each) => upload.querySelector(each));
    if (!file) return void (words.textContent = "Choose a file first.");
    button.disabled = true;
    bar.hidden = false;
    const onProgress = (sent) => {
      bar.value = (100 * sent) / file.size;
      words.textContent = `${Math.floor((100 * sent) / file.size)} %`;
    };
    let told = "";
    for (let tries = 1; tries <= MOST_TRIES; tries++) {
      let answer = { status: 0, text: "" };
      try {
        answer = await send(upload, file, await startOf(upload, file), onProgress);
      } catch { // the site is away: as when the connection breaks
      }
      if (answer.status === 200) return location.reload();
      told = answer.status === 0 ? "The connection broke. Upload it again to go on after what is there." : wordsOf(answer);
      if (!mayPass(answer)) break;
      words.textContent = "The connection broke; it goes on in a moment.";
      await sleep(2 ** tries);
    }
    words.textContent = told;
    button.disabled = false;
  }

  document.addEventListener("DOMContentLoaded", () => {
    document.querySelectorAll("[data-state][data-open]").forEach((box) => {
      if (!document.querySelector("[data-upload]")) follow(box);
    });
    const upload = document.querySelector("[data-upload]");
    if (upload) upload.querySelector("button").addEventListener("click", () => uploadFile(upload));
  });
})();
