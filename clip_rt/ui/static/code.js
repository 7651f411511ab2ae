// What is on the screen as a program: Python that uses clip_rt, or curl that asks this server.
// Files are named as far as a browser knows their names: below the folder that was chosen.

import { $, $$, say } from "./dom.js";
import { hasToken } from "./api.js";
import { batchUp } from "./pictures.js";

const WIDTH = 88;

/** Return a text as one word of a POSIX shell. */
export const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** Return a value of JSON as Python; its strings are literals of Python as they are. */
export function python(value) {
  if (Array.isArray(value)) {
    const items = value.map(python);
    const short = `[${items.join(", ")}]`;
    return short.length <= WIDTH ? short : `[\n${items.map((each) => `    ${each},\n`).join("")}]`;
  }
  const constants = new Map([
    [true, "True"],
    [false, "False"],
    [null, "None"],
  ]);
  return constants.get(value) ?? JSON.stringify(value);
}

/** Return the call that makes a client of a model. */
export function pythonClient(settings, model) {
  const options = { ...settings.client, model };
  const said = Object.entries(options).map(([name, value]) => `${name}=${python(value)}`);
  return `clip_rt.Client(${said.join(", ")})`;
}

/** Return options of a call, each with a comma before it; those that are null are left out. */
export function pythonOptions(options) {
  return Object.entries(options)
    .filter(([, value]) => value !== null && value !== false)
    .map(([name, value]) => `, ${name}=${python(value)}`)
    .join("");
}

const command = (path) =>
  [
    `curl -sS ${shell(location.origin + path)}`,
    ...(hasToken() ? ['-H "Authorization: Bearer $CLIP_RT_TOKEN"'] : []),
    "-H 'Content-Type: application/json'",
  ].join(" \\\n    ");

/**
 * Return commands that post JSON to a path.
 *
 * @param body What is sent.
 * @param pictures Images whose files go into its `images`, as many in each request as may be.
 */
export function curl(path, body, pictures, settings) {
  const text = JSON.stringify(body);
  if (!pictures.length) {
    return `${command(path)} \\\n    --data-binary ${shell(text)}\n`;
  }
  const begin = `${text.slice(0, -1)}${text === "{}" ? "" : ","}"images":["`;
  return [...batchUp(pictures, settings)]
    .map((batch) => {
      const files = batch.map((each) => `  base64 < ${shell(each.path)} | tr -d '\\n'\n`);
      const between = "  printf '%s' '\",\"'\n";
      return (
        `{\n  printf '%s' ${shell(begin)}\n${files.join(between)}` +
        `  printf '%s' '"]}'\n} | ${command(path)} \\\n    --data-binary @-\n`
      );
    })
    .join("\n");
}

/** Let a view's buttons copy what `write` returns for "python" or "curl"; null where nothing is. */
export function setUpCopies(results, write) {
  for (const button of $$("[data-copy]", results)) {
    button.addEventListener("click", async () => {
      const kind = button.dataset.copy;
      const code = write(kind);
      if (code === null) {
        say("There is nothing to copy yet.");
        return;
      }
      await copy(code, kind === "python" ? "Copied as Python" : "Copied as curl");
    });
  }
}

/** Copy a text, or show it where the browser does not let us. */
export async function copy(text, done) {
  try {
    await navigator.clipboard.writeText(text);
    say(done);
  } catch {
    $("#code").value = text;
    $("#code-dialog").showModal();
    $("#code").select();
  }
}
