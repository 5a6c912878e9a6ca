// What a clerk does, in headless Chromium, with a cluster that runs: sign in, ask, watch the answer stream in, open a
// source at its passage, stop an answer, upload a document. axe-core looks at every view.
//
//   node tests/browser.mjs DEMO_JSON SCREENSHOT_DIR

import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { launch, open, reachable, view as look } from "./chromium.mjs";

const [demoFile, shots] = process.argv.slice(2);
const demo = JSON.parse(readFileSync(demoFile, "utf8"));
const ANSWER_WITHIN_MS = 120_000; // a bound against hanging
const LONG = "Write a very long story about a small town, with at least ten chapters.";
const ATTEMPTS = 5; // a small model may end even a long story after a word

const browser = await launch();
const { page, complaints } = await open(browser, demo.base_url);
page.setDefaultTimeout(ANSWER_WITHIN_MS);
const files = mkdtempSync(join(tmpdir(), "verbund-"));
const view = (name) => look(page, shots, name);
const question = page.getByRole("textbox", { name: "Ihre Frage" });
const stop = page.getByRole("button", { name: "Anhalten" });
const answer = page.getByTestId("answer").last();

async function ask(text) {
  await question.fill(text);
  await page.keyboard.press("Enter");
}

async function newChat() {
  await page.getByRole("button", { name: "Neues Gespräch" }).click();
  await page.getByRole("heading", { name: "Was möchten Sie wissen?" }).waitFor();
}

/** Until `attempt` succeeds, each time in a new chat. */
async function repeatedly(what, attempt) {
  for (let i = 0; i < ATTEMPTS; i++) {
    await newChat();
    if (await attempt()) return;
  }
  assert.fail(`${what}: not in ${ATTEMPTS} attempts`);
}

/** From now on the page notes how long the last answer's text was while it was still running. */
const observe = () =>
  page.evaluate(() => {
    window.lengths = [];
    window.observer?.disconnect();
    window.observer = new MutationObserver(() => {
      const body = [...document.querySelectorAll('[data-testid="answer"]')].at(-1);
      const running = !!document.querySelector("button.stop");
      if (body && running && !body.querySelector(".waiting")) window.lengths.push(body.textContent.trim().length);
    });
    window.observer.observe(document.body, { subtree: true, childList: true, characterData: true });
  });

try {
  await page.goto(demo.base_url);
  await page.getByLabel("Zugangsschlüssel").fill("vb-falsch");
  await page.getByRole("button", { name: "Anmelden" }).click();
  await page.getByText("Dieser Schlüssel gilt nicht").waitFor();
  await view("1-anmelden");
  complaints.length = 0; // the refused sign-in is logged by the browser

  await page.getByLabel("Zugangsschlüssel").fill(demo.api_key);
  await page.keyboard.press("Enter");
  await question.waitFor();
  await page.getByRole("checkbox").first().waitFor(); // the collections are there, and chosen
  await view("2-leer");

  // Keyboard only: type, Enter.
  await ask("Wie hoch ist die Hundesteuer?");
  await page.getByTestId("citation").first().waitFor();
  await stop.waitFor({ state: "hidden" });
  assert.ok((await answer.innerText()).trim().length > 0, "an answer came");
  assert.ok(await page.getByText("KI-generiert", { exact: true }).first().isVisible());
  await view("3-antwort");

  await page.getByTestId("citation").first().focus();
  await page.keyboard.press("Enter");
  const source = page.getByTestId("source");
  await source.locator("mark").waitFor();
  assert.equal(await source.locator("mark").count(), 1, "one passage is marked");
  assert.ok((await source.locator("mark").innerText()).trim().length > 20, "the passage is shown");
  await view("4-quelle");
  await page.keyboard.press("Escape");
  await source.waitFor({ state: "hidden" });

  // From general knowledge, so that the answers are long.
  for (const box of await page.getByRole("checkbox").all()) await box.uncheck();
  await repeatedly("an answer grows while it streams", async () => {
    await observe();
    await ask(LONG);
    await page.waitForFunction(() => window.lengths.some((n) => n > 0) || !document.querySelector("button.stop"));
    await page.screenshot({ path: join(shots, "5-strom.png") });
    await stop.waitFor({ state: "hidden" });
    const lengths = await page.evaluate(() => window.lengths.filter((n) => n > 0));
    return lengths.length > 1 && lengths.at(-1) > lengths[0];
  });

  await repeatedly("an answer is stopped", async () => {
    await observe();
    await ask(LONG);
    await page.waitForFunction(() => window.lengths.some((n) => n > 0) || !document.querySelector("button.stop"));
    const clicked = await page.evaluate(() => {
      const button = document.querySelector("button.stop");
      button?.click();
      return !!button;
    });
    await stop.waitFor({ state: "hidden" });
    return clicked && (await page.getByText("Angehalten.", { exact: true }).first().isVisible());
  });
  const stopped = await answer.innerText();
  await page.waitForTimeout(1000);
  assert.equal(await answer.innerText(), stopped, "nothing comes after the stop");
  await view("6-angehalten");

  await page.getByRole("button", { name: "Dokumente" }).click();
  await page.getByLabel("Neue Sammlung").fill("Aus dem Browser");
  await page.getByRole("button", { name: "Anlegen" }).click();
  await page.getByRole("button", { name: "Aus dem Browser", pressed: true }).waitFor();
  const names = ["merkblatt.txt", "leer.txt", "wegweiser.txt"];
  const paths = names.map((name) => join(files, name));
  writeFileSync(paths[0], "Merkblatt\n\nDas Bürgerbüro öffnet mittwochs um sieben Uhr dreißig.\n");
  writeFileSync(paths[1], "");
  writeFileSync(paths[2], "Wegweiser\n\nDas Standesamt ist im zweiten Stock.\n");
  await page.locator('input[type="file"]').setInputFiles(paths);
  for (const name of [names[0], names[2]]) {
    await page.getByTestId("document").filter({ hasText: name }).getByText("bereit").waitFor();
  }
  await page.getByTestId("refusals").getByText("leer.txt: Die Datei ist leer.").waitFor();
  await view("7-dokumente");

  await page.setViewportSize({ width: 640, height: 425 }); // 200 % zoom of 1280 × 850
  await view("8-zoom-dokumente");
  await reachable(page, [page.getByLabel("Neue Sammlung"), page.getByRole("button", { name: "Dateien auswählen" }), page.getByTestId("document").last()], "documents");
  await page.getByRole("button", { name: "Fragen", exact: true }).click();
  await view("9-zoom-gespraech");
  await reachable(page, [answer, page.getByRole("button", { name: "Antwort kopieren" }), question], "a chat");
  await newChat();
  await view("10-zoom-leer");
  const first = page.getByRole("heading", { name: "Was möchten Sie wissen?" });
  await reachable(page, [question, page.getByRole("button", { name: "Führungszeugnis" }), first], "a new chat");
  assert.deepEqual(complaints, []);
  console.log("browser: every view without axe-core violations");
} finally {
  await browser.close();
  rmSync(files, { recursive: true });
}
