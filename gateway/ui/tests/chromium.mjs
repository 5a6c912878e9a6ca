// Headless Chromium as the page's tests want it: no traffic of its own, and axe-core at hand.

import assert from "node:assert/strict";
import { join } from "node:path";
import { AxeBuilder } from "@axe-core/playwright";
import { chromium } from "playwright-core";

export const launch = () =>
  chromium.launch({
    timeout: 120_000, // on a machine that builds at the same time
    executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
    args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
  });

/** A page, and what it complained about: script errors, console errors, requests to other places than `base`. */
export async function open(browser, base) {
  const context = await browser.newContext({ locale: "de-DE", viewport: { width: 1280, height: 850 } });
  const page = await context.newPage();
  const complaints = [];
  page.on("pageerror", (e) => complaints.push(String(e)));
  page.on("console", (m) => m.type() === "error" && complaints.push(m.text()));
  page.on("request", (r) => {
    if (!r.url().startsWith(base) && !/^(blob|data):/.test(r.url())) complaints.push(`foreign request: ${r.url()}`);
  });
  return { page, complaints };
}

/** A screenshot of what is seen now, without violations by axe-core. */
export async function view(page, folder, name) {
  // What is still fading in has no contrast yet.
  await page.evaluate(() => Promise.allSettled(document.getAnimations().map((a) => a.finished)));
  const { violations } = await new AxeBuilder({ page }).analyze();
  if (folder) await page.screenshot({ path: join(folder, `${name}.png`) });
  assert.deepEqual(violations.map((v) => `${v.id}: ${v.nodes.map((n) => n.html).join(" ")}`), [], `axe-core on ${name}`);
}

/** Nothing is cut off at the sides, and each of `parts` can be scrolled to and is covered by nothing. */
export async function reachable(page, parts, where) {
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  assert.ok(wide <= 0, `${where}: no sideways scrolling (${wide} px too wide)`);
  for (const part of parts) {
    await part.scrollIntoViewIfNeeded();
    const seen = await part.evaluate((node) => {
      const box = node.getBoundingClientRect();
      const top = document.elementFromPoint(box.left + box.width / 2, box.top + Math.min(box.height / 2, 10));
      return box.top >= 0 && box.left >= 0 && box.right <= innerWidth && !!top && (node.contains(top) || top.contains(node));
    });
    assert.ok(seen, `${where}: ${part} can be scrolled to`);
  }
}
