// Requests to the server of this page, its token, and whether it is there.

import { $, make } from "./dom.js";

const CHECK_MS = 4000;
const CHECK_GONE_MS = 1000;
const TOKEN = "clip_rt.token";

/** The server refused a request. */
export class Problem extends Error {
  constructor(message, { status, code, param, retryAfter_s }) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter_s });
  }
}

/** The server is not there. */
export class Gone extends Error {}

/** Tells "back" once the server is there again. */
export const server = new EventTarget();

let isGone = false;
let timer;

const token = () => sessionStorage.getItem(TOKEN);
export const hasToken = () => token() !== null;

/** Ask a path; return its answer. With `body` by POST, of JSON. */
export async function ask(path, body, { signal, read = (answer) => answer.json() } = {}) {
  const options = { signal, headers: {} };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  for (;;) {
    if (token()) {
      options.headers.Authorization = `Bearer ${token()}`;
    }
    let answer;
    try {
      answer = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") {
        throw error;
      }
      noteGone();
      throw new Gone("The server does not answer.");
    }
    if (answer.ok) {
      return read(answer);
    }
    const problem = await readProblem(answer);
    if (problem.status === 401) {
      await askForToken(hasToken());
    } else if (problem.status === 429) {
      await new Promise((done) => setTimeout(done, 1000 * problem.retryAfter_s));
      signal?.throwIfAborted();
    } else {
      throw problem;
    }
  }
}

async function readProblem(answer) {
  let told = {};
  try {
    told = (await answer.json()).error;
  } catch {
    // Of something between here and the server.
  }
  return new Problem(told.message ?? `The server answered ${answer.status}.`, {
    ...told,
    status: answer.status,
    retryAfter_s: Number(answer.headers.get("Retry-After")) || 1,
  });
}

let asking;

function askForToken(wasWrong) {
  // All requests that are refused meanwhile wait for the same answer.
  asking ??= new Promise((done) => {
    const dialog = $("#token-dialog");
    const error = $(".error", dialog);
    error.textContent = "That token is not known here.";
    error.hidden = !wasWrong;
    const end = () => {
      const given = $("#token").value.trim();
      if (!given) {
        dialog.showModal();
        return;
      }
      dialog.removeEventListener("close", end);
      sessionStorage.setItem(TOKEN, given);
      asking = undefined;
      done();
    };
    dialog.addEventListener("close", end);
    dialog.showModal();
  });
  return asking;
}

function noteGone() {
  if (!isGone) {
    isGone = true;
    $("#banner").replaceChildren(
      make("p", {}, "The server is gone. This page goes on by itself when it is back."),
    );
  }
  watchServer(CHECK_GONE_MS);
}

/** Look from time to time whether the server is there. */
export function watchServer(wait_ms = CHECK_MS) {
  clearTimeout(timer);
  timer = setTimeout(async () => {
    let isThere = false;
    try {
      isThere = (await fetch("/health/live", { cache: "no-store" })).ok;
    } catch {
      // It is not.
    }
    if (!isThere) {
      noteGone();
      return;
    }
    if (isGone) {
      isGone = false;
      $("#banner").replaceChildren();
      server.dispatchEvent(new Event("back"));
    }
    watchServer();
  }, wait_ms);
}
