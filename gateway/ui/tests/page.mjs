// How the page behaves when things go wrong, in headless Chromium, against a gateway that is made up here and does as it is
// told. Needs no cluster; `browser.mjs` is for what works.
//
//   node tests/page.mjs [SCREENSHOT_DIR]

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { launch, open, reachable, view as look } from "./chromium.mjs";

const shots = process.argv[2];
const WITHIN_MS = 120_000; // a bound against hanging, also on a machine that builds at the same time
const KINDS = { html: "text/html", js: "text/javascript", css: "text/css", svg: "image/svg+xml" };
const ME = { tenant: "musterstadt", name: "Stadt Musterstadt", admin: false, max_upload_bytes: 1024, max_collections: 32 };
const CITATION = { number: 1, document_id: "doc_1", document: "satzung.pdf", page: 2, heading: "§ 3", passage: "96 Euro", score: 0.5, chunk: 1 };

/** "METHOD path" → (request, response, body); what is not in it is 404. */
let routes;
let asked = [];

const json = (body, status = 200) => (_, response) => {
  response.writeHead(status, { "Content-Type": "application/json" });
  response.end(JSON.stringify(body));
};
const refusal = (status, code) => json({ error: { message: "English words of the server", type: "x", param: null, code } }, status);
const list = (data) => json({ object: "list", data });
const collection = (i) => ({ id: `col_${i}`, name: `Sammlung ${i}`, documents: 0 });
const document = (id, status = "ready") => ({ id, name: `${id}.txt`, status, progress: 0, error: null });
const events = (chunks, done = true) => (_, response) => {
  response.writeHead(200, { "Content-Type": "text/event-stream; charset=utf-8" });
  for (const chunk of chunks) response.write(`data: ${JSON.stringify(chunk)}\n\n`);
  response.end(done ? "data: [DONE]\n\n" : "");
};
const piece = (content, more = {}) => ({ choices: [{ index: 0, delta: { content }, finish_reason: null }], ...more });
const ending = (finish_reason) => ({ choices: [{ index: 0, delta: {}, finish_reason }] });
const count = (what) => asked.filter((one) => one.what === what).length;

function reset() {
  asked = [];
  routes = {
    "GET /api/me": json(ME),
    "GET /api/collections": list([collection(1), collection(2)]),
    "GET /v1/models": list([{ id: "m", kind: "generate" }]),
    "POST /v1/chat/completions": events([piece("Gut"), piece("en Tag"), ending("stop")]),
    "GET /api/collections/col_1/documents": list([document("eins")]),
    "GET /api/collections/col_2/documents": list([document("zwei")]),
  };
}

const server = createServer(async (request, response) => {
  const body = [];
  for await (const part of request) body.push(part);
  const what = `${request.method} ${request.url}`;
  asked.push({ what, body: Buffer.concat(body).toString() });
  if (/^\/(api|v1)\//.test(request.url)) return (routes[what] ?? refusal(404, "not_found"))(request, response);
  const name = request.url === "/" ? "index.html" : request.url.slice(1);
  const content = await readFile(new URL(`../dist/${name}`, import.meta.url)).catch(() => null);
  response.writeHead(content ? 200 : 404, { "Content-Type": KINDS[name.split(".").pop()] ?? "text/plain" });
  response.end(content);
});
await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
const base = `http://127.0.0.1:${server.address().port}`;
const browser = await launch();
let page;
const question = () => page.getByRole("textbox", { name: "Ihre Frage" });
const alert = (text) => page.getByRole("alert").filter({ hasText: text });
const signIn = () => page.getByLabel("Zugangsschlüssel");

async function start(key = "vb-1") {
  await page.goto(`${base}/#key=${key}`);
}

async function ask(text) {
  await question().fill(text);
  await page.keyboard.press("Enter");
}

const cases = {
  "a gateway that is not ready is no sign-out": async () => {
    routes["GET /api/me"] = refusal(503, "cluster_unknown");
    await start();
    await alert("Das System startet gerade").waitFor();
    assert.equal(await signIn().count(), 0);
    await look(page, shots, "nicht-bereit");
    routes["GET /api/me"] = json(ME);
    await page.getByRole("button", { name: "Erneut versuchen" }).click();
    await question().waitFor();
  },
  "a refused key is a sign-out": async () => {
    routes["GET /api/me"] = refusal(401, "invalid_api_key");
    await start();
    await signIn().waitFor();
    await signIn().fill("Schlüssel");
    await page.keyboard.press("Enter");
    await alert("Dieser Schlüssel gilt nicht").waitFor();
  },
  "a key that is revoked in the middle leads back to the sign-in": async () => {
    await start();
    await page.getByRole("checkbox").first().waitFor();
    routes["POST /v1/chat/completions"] = refusal(401, "invalid_api_key");
    await ask("Frage");
    await alert("Ihr Zugangsschlüssel gilt nicht mehr").waitFor();
    await signIn().waitFor();
    routes["POST /v1/chat/completions"] = events([ending("stop")]);
    await signIn().fill("vb-2");
    await page.keyboard.press("Enter");
    await question().waitFor();
    assert.equal(await page.getByText("Frage", { exact: true }).count(), 0, "what the last one asked is not for the next one");
  },
  "nothing is asked without knowing the collections": async () => {
    routes["GET /api/collections"] = refusal(503, "store_unavailable");
    await start();
    await alert("Ihre Sammlungen konnten nicht geladen werden. Der Dokumentenspeicher ist gerade nicht erreichbar").waitFor();
    await ask("Frage");
    assert.ok(await page.getByRole("button", { name: "Frage senden" }).isDisabled());
    await look(page, shots, "ohne-sammlungen");
    routes["GET /api/collections"] = list([collection(1)]);
    await page.getByRole("button", { name: "Erneut versuchen" }).click();
    await page.getByRole("checkbox", { name: "Sammlung 1", checked: true }).waitFor();
    assert.equal(count("POST /v1/chat/completions"), 0, "nothing was asked before");
    await page.getByRole("button", { name: "Frage senden" }).click();
    await page.getByText("Guten Tag").waitFor();
    const [{ body }] = asked.filter((one) => one.what === "POST /v1/chat/completions");
    assert.deepEqual(JSON.parse(body).collections, ["col_1"]);
    assert.equal(JSON.parse(body).max_tokens, 1024);
  },
  "no more collections are chosen than a question may have": async () => {
    routes["GET /api/collections"] = list(Array.from({ length: 40 }, (_, i) => collection(i)));
    await start();
    await page.getByText("höchstens 32 Sammlungen").waitFor();
    assert.equal(await page.getByRole("checkbox", { checked: true }).count(), 32);
    assert.ok(await page.getByRole("checkbox", { name: "Sammlung 39" }).isDisabled());
    await page.getByRole("checkbox", { name: "Sammlung 0" }).uncheck();
    await page.getByRole("checkbox", { name: "Sammlung 39" }).check();
    await ask("Frage");
    await page.getByText("Guten Tag").waitFor();
    const sent = JSON.parse(asked.find((one) => one.what === "POST /v1/chat/completions").body).collections;
    assert.ok(sent.length === 32 && sent.includes("col_39") && !sent.includes("col_0"), `${sent}`);
    await page.setViewportSize({ width: 640, height: 425 });
    await reachable(page, [question(), page.getByRole("checkbox").first(), page.getByRole("button", { name: "Neues Gespräch" })], "many collections");
    await look(page, shots, "viele-sammlungen");
  },
  "a stream without its last event is no complete answer": async () => {
    routes["POST /v1/chat/completions"] = events([piece("Die Steuer beträgt")], false);
    await start();
    await page.getByRole("checkbox").first().waitFor();
    await ask("Frage");
    await alert("Die Antwort wurde unterbrochen").waitFor();
    assert.ok(await page.getByText("Die Steuer beträgt").isVisible(), "what came stays");
    await look(page, shots, "unterbrochen");
  },
  "an error in a stream, a busy system and a cut-off answer are said in German": async () => {
    await start();
    await page.getByRole("checkbox").first().waitFor();
    const spoken = [
      [events([piece("Die"), { error: { code: "model_not_ready", message: "English words of the server" } }], false), alert("Das Sprachmodell wird gerade geladen")],
      [refusal(429, "rate_limit_exceeded"), alert("Das System ist gerade ausgelastet")],
      [refusal(400, "context_length_exceeded"), alert("Das Gespräch ist zu lang geworden")],
      [refusal(418, "never_heard_of"), alert("Unerwarteter Fehler (never_heard_of)")],
      [(_, response) => response.destroy(), alert("Der Server ist nicht erreichbar")],
      [events([piece("Die"), ending("length")]), page.getByText("ist hier abgeschnitten")],
    ];
    for (const [answer, said] of spoken) {
      routes["POST /v1/chat/completions"] = answer;
      await ask("Frage");
      await said.waitFor();
    }
    assert.equal(await page.getByText("English words").count(), 0);
    await page.getByRole("button", { name: "English" }).click();
    await alert("The system is busy").waitFor();
    await page.getByRole("button", { name: "Deutsch" }).click();
  },
  "a source is found by its place in the document, not by its words": async () => {
    const chunks = ["Präambel", "96  Euro\nje Hund", "96 Euro", "Inkrafttreten"].map((text, ordinal) => ({ ordinal, page: 1, heading: null, text }));
    routes["POST /v1/chat/completions"] = events([piece("96 Euro [1]", { citations: [CITATION] }), ending("stop")]);
    routes["GET /api/documents/doc_1/chunks"] = list(chunks);
    await start();
    await page.getByRole("checkbox").first().waitFor();
    await ask("Frage");
    await page.getByTestId("citation").click();
    const source = page.getByTestId("source");
    await source.getByText("Präambel").waitFor();
    assert.deepEqual(await source.locator("mark").allInnerTexts(), [chunks[1].text]);
    await page.keyboard.press("Escape");
    await page.getByRole("button", { name: "Antwort kopieren" }).click();
    await page.getByText("Kopiert", { exact: true }).waitFor();
  },
  "a refused file does not keep the others back": async () => {
    let uploads = 0;
    routes["GET /api/collections/col_1/documents"] = list([]);
    routes["POST /api/collections/col_1/documents"] = (...at) => {
      const made = document(`neu${++uploads}`);
      return (uploads === 2 ? refusal(507, "disk_full") : json(made, 201))(...at);
    };
    await start();
    await page.getByRole("button", { name: "Dokumente" }).click();
    await page.getByText("je Datei höchstens 1 KB").waitFor();
    const file = (name, bytes) => ({ name, mimeType: "text/plain", buffer: Buffer.alloc(bytes, "x") });
    const files = [file("a.txt", 10), file("b.txt", 10), file("zu-gross.txt", 1025), file("leer.txt", 0), file("c.txt", 10)];
    await page.locator('input[type="file"]').setInputFiles(files);
    await page.getByTestId("document").filter({ hasText: "neu3" }).waitFor();
    const refused = await page.getByTestId("refusals").getByRole("listitem").allInnerTexts();
    assert.equal(refused.length, 3, `${refused}`);
    assert.match(refused[0], /^b\.txt: Der Dokumentenspeicher ist voll/);
    assert.match(refused[1], /^zu-gross\.txt: Die Datei hat 1,1 KB, erlaubt sind höchstens 1 KB/);
    assert.match(refused[2], /^leer\.txt: Die Datei ist leer/);
    assert.equal(await page.getByTestId("document").count(), 2);
    await look(page, shots, "abgelehnte-dateien");
  },
  "a late reply does not replace what was chosen since": async () => {
    let late;
    routes["GET /api/collections/col_1/documents"] = (_, response) => (late = response);
    await start();
    await page.getByRole("button", { name: "Dokumente" }).click();
    await page.getByRole("button", { name: "Sammlung 2" }).click();
    await page.getByTestId("document").filter({ hasText: "zwei.txt" }).waitFor();
    list([document("eins")])(null, late);
    await page.waitForTimeout(300);
    assert.deepEqual(await page.getByTestId("document").locator("td:first-child").allInnerTexts(), ["zwei.txt"]);
  },
  "a document's way is told, and asking ends where there is nothing to ask": async () => {
    const path = "GET /api/collections/col_1/documents";
    routes[path] = list([document("eins", "processing")]);
    await start();
    await page.getByRole("button", { name: "Dokumente" }).click();
    await page.getByText("wird gelesen").waitFor();
    routes[path] = list([document("eins")]);
    await page.getByRole("status").filter({ hasText: "eins.txt: bereit" }).waitFor({ state: "attached" });
    const settled = count(path);
    routes[path] = list([document("eins", "queued")]);
    await page.waitForTimeout(1500);
    assert.equal(count(path), settled, "nobody asks about documents that are ready");

    await page.getByRole("button", { name: "Sammlung 1" }).click();
    await page.getByText("wartet").waitFor();
    routes[path] = refusal(401, "invalid_api_key");
    await signIn().waitFor();
    const refused = count(path);
    await page.waitForTimeout(1500);
    assert.equal(count(path), refused, "nobody asks after the sign-out");
  },
};

try {
  for (const [name, run] of Object.entries(cases)) {
    reset();
    const opened = await open(browser, base);
    page = opened.page;
    page.setDefaultTimeout(WITHIN_MS);
    await run().catch((e) => {
      e.message = `${name}: ${e.message}`;
      throw e;
    });
    const wrong = opened.complaints.filter((c) => !/Failed to load resource/.test(c)); // refusals are wanted here
    assert.deepEqual(wrong, [], name);
    await page.context().close();
    console.log(`page: ${name}`);
  }
} finally {
  await browser.close();
  server.close();
}
