// Opens lessons in a real JupyterLab in a headless Chromium, runs all cells, and moves a widget.
//
//   apt-get install chromium             (or set CHROMIUM to the path of any Chromium)
//   cd tests/browser && npm install && node run.mjs 00_tour 08_fp8_formats 11_dualpipe 12_the_bill
//
// JUPYTER names the jupyter program (default: jupyter on the PATH), OUT the folder for screenshots.
// Ends with status 1 if a cell raised, a cell was not run, or a widget did not answer. Without names: all lessons.
// The notebooks are copied first, so the committed ones keep their outputs; MINIDSV3_FAST=1 makes the run short.

import { spawn } from "node:child_process";
import { cpSync, mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const here = dirname(fileURLToPath(import.meta.url));
const root = resolve(here, "..", "..");
const out = resolve(process.env.OUT ?? join(here, "screenshots"));
const browserPath = process.env.CHROMIUM ?? "/usr/bin/chromium";
const port = 8899;
const minutes = 6; // for one lesson

const room = mkdtempSync(join(tmpdir(), "minidsv3-lab-"));
cpSync(join(root, "notebooks"), room, { recursive: true });
mkdirSync(out, { recursive: true });
// All cells stay in the page, also those outside of the window.
const settings = mkdtempSync(join(tmpdir(), "minidsv3-settings-"));
mkdirSync(join(settings, "@jupyterlab", "notebook-extension"), { recursive: true });
const tracker = join(settings, "@jupyterlab", "notebook-extension", "tracker.jupyterlab-settings");
writeFileSync(tracker, JSON.stringify({ windowingMode: "none" }));
mkdirSync(join(settings, "@jupyterlab", "apputils-extension"), { recursive: true });
const news = join(settings, "@jupyterlab", "apputils-extension", "notification.jupyterlab-settings");
writeFileSync(news, JSON.stringify({ fetchNews: "false", checkForUpdates: false }));
const lessonsIn = (folder) => readdirSync(folder).filter((name) => /^\d\d_.*\.ipynb$/.test(name));
for (const name of lessonsIn(room)) { // without outputs: what is there later comes from this run
  const notebook = JSON.parse(readFileSync(join(room, name), "utf8"));
  for (const cell of notebook.cells) if (cell.cell_type === "code") Object.assign(cell, { outputs: [], execution_count: null });
  writeFileSync(join(room, name), JSON.stringify(notebook));
}
const all = lessonsIn(room).map((name) => name.slice(0, -6));
const lessons = process.argv.length > 2 ? process.argv.slice(2) : all;

async function startLab() {
  const flags = ["lab", "--no-browser", "--allow-root", "--ServerApp.token=", "--ServerApp.password=",
    `--ServerApp.port=${port}`, `--ServerApp.root_dir=${room}`, "--ServerApp.port_retries=0"];
  const environment = { ...process.env, PYTHONPATH: root, JUPYTERLAB_SETTINGS_DIR: settings };
  const server = spawn(process.env.JUPYTER ?? "jupyter", flags, { env: environment, stdio: "ignore" });
  server.on("error", (error) => { throw error; });
  for (let i = 0; i < 120; i++) {
    try {
      if ((await fetch(`http://127.0.0.1:${port}/api`)).ok) return server;
    } catch { /* not up yet */ }
    await new Promise((done) => setTimeout(done, 500));
  }
  server.kill();
  throw new Error("JupyterLab did not start within a minute");
}

async function model(page) {
  const answer = await page.request.get(`http://127.0.0.1:${port}/api/contents/${page.lesson}.ipynb?content=1`);
  return (await answer.json()).content;
}

async function runAll(page, lesson) {
  page.lesson = lesson;
  await page.goto(`http://127.0.0.1:${port}/lab/workspaces/check/tree/${lesson}.ipynb?reset`);
  await page.waitForSelector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell", { timeout: 60_000 });
  const kernel = page.locator('.jp-Dialog button:has-text("Select")'); // asked for the kernel of a new room
  await kernel.click({ timeout: 5_000 }).catch(() => {});
  await page.waitForSelector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', { timeout: 60_000 });
  await page.click('.lm-MenuBar-itemLabel:text-is("Run")');
  await page.click('.lm-Menu-itemLabel:text-is("Run All Cells")');
  const deadline = Date.now() + minutes * 60_000;
  let result;
  do { // saved again and again: the file on the server says what has run
    await page.waitForTimeout(3000);
    await page.keyboard.press("Control+s");
    await page.waitForTimeout(1000);
    const cells = (await model(page)).cells.filter((cell) => cell.cell_type === "code");
    const raised = cells.flatMap((cell) => cell.outputs.filter((o) => o.output_type === "error"));
    const status = await page.evaluate(() => document.querySelector(".jp-Notebook-ExecutionIndicator")?.dataset.status);
    result = {
      cells: cells.length,
      errors: raised.map((o) => `${o.ename}: ${o.evalue}`),
      inOrder: status === "idle" && cells.every((cell, i) => cell.execution_count === i + 1),
    };
  } while (!result.inOrder && !result.errors.length && Date.now() < deadline);
  return result;
}

async function moveWidget(page) {
  const found = await page.$(".widget-interact");
  if (!found) return "none";
  await found.scrollIntoViewIfNeeded();
  await page.waitForTimeout(1500);
  const shown = () => found.evaluate((node) => node.querySelector("img")?.src ?? node.innerText);
  const before = await shown();
  const select = await found.$("select");
  const slider = await found.$('[role="slider"], .noUi-handle');
  if (select) {
    const values = await select.$$eval("option", (options) => options.map((o) => o.value));
    await select.selectOption(values[1]);
  } else if (slider) {
    await slider.focus();
    await page.keyboard.press("ArrowRight");
  }
  for (let wait = 0; wait < 60; wait++) {
    await page.waitForTimeout(500);
    if ((await shown()) !== before) return "answered";
  }
  return "did not answer";
}

const server = await startLab();
const browser = await chromium.launch({ executablePath: browserPath, args: ["--no-sandbox"] });
let failed = 0;
try {
  for (const lesson of lessons) {
    const page = await browser.newPage({ viewport: { width: 1280, height: 900 } });
    const result = await runAll(page, lesson);
    const widget = await moveWidget(page);
    await page.screenshot({ path: join(out, `${lesson}.png`) });
    const wrong = result.errors.length > 0 || !result.inOrder || widget === "did not answer";
    failed += wrong ? 1 : 0;
    const said = result.errors.length ? result.errors.join("; ") : "no error";
    console.log(`${lesson}: ${result.cells} cells, ${said}${result.inOrder ? "" : ", not all run in order"}; widget: ${widget}`);
    await page.close();
  }
} finally {
  await browser.close();
  server.kill();
  rmSync(room, { recursive: true, force: true });
  rmSync(settings, { recursive: true, force: true });
}
process.exit(failed ? 1 : 0);
