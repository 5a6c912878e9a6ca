// What a clerk does, in headless Chromium, with a cluster that runs: sign in, ask, watch the answer stream in, open a
// source at its passage, stop an answer, upload a document. axe-core looks at every view.
//
//   node tests/browser.mjs DEMO_JSON SCREENSHOT_DIR

import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { AxeBuilder } from "@axe-core/playwright";
import { chromium } from "playwright-core";

const [demoFile, shots] = process.argv.slice(2);
const demo = JSON.parse(readFileSync(demoFile, "utf8"));
const ANSWER_WITHIN_MS = 120_000; // a bound against hanging

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
const context = await browser.newContext({ locale: "de-DE", viewport: { width: 1280, height: 850 } });
const page = await context.newPage();
const complaints = [];
page.on("pageerror", (e) => complaints.push(String(e)));
page.on("console", (m) => m.type() === "error" && complaints.push(m.text()));
page.on("request", (r) => {
  if (!r.url().startsWith(demo.base_url) && !/^(blob|data):/.test(r.url())) complaints.push(`foreign request: ${r.url()}`);
});

async function view(name) {
  const { violations } = await new AxeBuilder({ page }).analyze();
  await page.screenshot({ path: join(shots, `${name}.png`) });
  assert.deepEqual(violations.map((v) => `${v.id}: ${v.nodes.map((n) => n.html).join(" ")}`), [], `axe-core on ${name}`);
}

try {
  await page.goto(demo.base_url);
  await page.getByLabel("Zugangsschlüssel").fill("vb-falsch");
  await page.getByRole("button", { name: "Anmelden" }).click();
  await page.getByText("Dieser Schlüssel gilt nicht").waitFor();
  await view("anmelden");
  complaints.length = 0; // the refused sign-in is logged by the browser

  await page.getByLabel("Zugangsschlüssel").fill(demo.api_key);
  await page.keyboard.press("Enter");
  const question = page.getByRole("textbox", { name: "Ihre Frage" });
  await question.waitFor();
  await view("leer");

  // Keyboard only: type, Enter.
  await question.fill("Wie hoch ist die Hundesteuer?");
  await page.keyboard.press("Enter");
  const answer = page.getByTestId("answer").last();
  await page.waitForFunction(
    () => [...document.querySelectorAll('[data-testid="answer"]')].at(-1)?.querySelector(":not(.waiting)")?.textContent.trim().length > 0 &&
      !document.querySelector(".waiting"),
    undefined,
    { timeout: ANSWER_WITHIN_MS },
  );
  const early = (await answer.innerText()).length;
  const streaming = await page.getByRole("button", { name: "Anhalten" }).isVisible();
  await page.screenshot({ path: join(shots, "strom.png") });
  await page.getByTestId("citation").first().waitFor({ timeout: ANSWER_WITHIN_MS });
  const whole = (await answer.innerText()).length;
  assert.ok(whole > 0 && (streaming ? whole >= early : true), "the answer grew while it streamed");
  assert.ok(streaming, "text was visible before the answer was complete");
  assert.ok(await page.getByText("KI-generiert", { exact: true }).first().isVisible());
  await view("antwort");

  await page.getByTestId("citation").first().focus();
  await page.keyboard.press("Enter");
  const source = page.getByTestId("source");
  await source.locator("mark").waitFor();
  assert.ok((await source.locator("mark").innerText()).trim().length > 20, "the passage is shown");
  await view("quelle");
  await page.keyboard.press("Escape");
  await source.waitFor({ state: "hidden" });

  await question.fill("Erzähle eine sehr lange Geschichte über eine Stadt.");
  await page.keyboard.press("Enter");
  await page.getByRole("button", { name: "Anhalten" }).click();
  await page.getByText("Angehalten.", { exact: true }).first().waitFor();

  await page.getByRole("button", { name: "Dokumente" }).click();
  await page.getByLabel("Neue Sammlung").fill("Aus dem Browser");
  await page.getByRole("button", { name: "Anlegen" }).click();
  const file = join(mkdtempSync(join(tmpdir(), "verbund-")), "merkblatt.txt");
  writeFileSync(file, "Merkblatt\n\nDas Bürgerbüro öffnet mittwochs um sieben Uhr dreißig.\n");
  await page.locator('input[type="file"]').setInputFiles(file);
  await page.getByTestId("document").getByText("bereit").waitFor({ timeout: ANSWER_WITHIN_MS });
  await view("dokumente");

  await page.setViewportSize({ width: 640, height: 425 }); // 200 % zoom of 1280 × 850
  await view("zoom");
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  assert.ok(wide <= 0, `no sideways scrolling at 200 % (${wide} px too wide)`);
  assert.deepEqual(complaints, []);
  console.log("browser: every view without axe-core violations");
} finally {
  await browser.close();
}
