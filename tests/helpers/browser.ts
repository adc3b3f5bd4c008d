/**
 * A real browser: Debian's Chromium, driven by Bun. What it complains of is kept. A test waits for
 * what the page tells, not for time to pass; and never for ever: what does not come fails it, with
 * what was waited for and what the page says.
 */

import * as fs from "node:fs";
import { resolve } from "node:path";
import { Temp } from "./temp.ts";
import { need, quoted, until } from "./tool.ts";

/** Set to keep screenshots of what the tests see: `SCREENSHOTS=1 bun test tests/page.test.ts`. */
const IS_SHOWN = Boolean(process.env.SCREENSHOTS);
/** Where they land; ignored by git. */
const SCREENSHOTS = resolve(import.meta.dir, "../screenshots");

/** How a browser is opened. */
export interface BrowserOptions {
  width?: number;
  height?: number;
  /** What the system wishes. */
  dark?: boolean;
  /** Whether pages may run scripts; `true`. */
  scripts?: boolean;
  /** Of its clock. */
  zone?: string;
}

/** The one Chromium of a test file, and its directory, in which all is that it writes. */
class Chromium {
  readonly #temp: Temp;
  /** What starts it. */
  readonly path: string;

  constructor() {
    const program = need("chromium");
    this.#temp = new Temp();
    const home = quoted(this.#temp.path);
    this.path = this.#temp.at("chromium");
    const script = [
      "#!/bin/sh",
      `export HOME=${home} TMPDIR=${home} && cd ${home} && echo $$ > pid`,
      "unset XDG_CACHE_HOME XDG_CONFIG_HOME XDG_DATA_HOME",
      // By its session, all of its processes are found again.
      `exec ${need("setsid")} ${program} "$@" 2> log`,
    ];
    fs.writeFileSync(this.path, `${script.join("\n")}\n`, { mode: 0o755 });
  }

  get profile(): string {
    return this.#temp.at("profile");
  }

  /** What it wrote last, in case that it did not start. */
  get log(): string {
    const log = this.#temp.at("log");
    return fs.existsSync(log) ? fs.readFileSync(log, "utf8").slice(-2000) : "nothing";
  }

  /** Its processes, but for those that have ended. */
  #processes(): string[] {
    const session = fs.readFileSync(this.#temp.at("pid"), "utf8").trim();
    return fs.readdirSync("/proc").filter((pid) => {
      if (!/^\d+$/.test(pid)) return false;
      try {
        const stat = fs.readFileSync(`/proc/${pid}/stat`, "utf8");
        const [state, , , of] = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
        // Those that report crashes have sessions of their own.
        const isIts =
          of === session ||
          fs.readFileSync(`/proc/${pid}/cmdline`, "utf8").includes(this.#temp.path);
        return isIts && state !== "Z" && Number(pid) !== process.pid;
      } catch {
        return false;
      }
    });
  }

  /** Ends it, and waits until nothing of it is left. */
  async end(): Promise<void> {
    Bun.WebView.closeAll();
    if (fs.existsSync(this.#temp.at("pid"))) {
      await until(
        "no process of Chromium is left",
        () => this.#processes(),
        ({ length }) => length === 0,
      );
    }
    this.#temp[Symbol.dispose]();
  }
}

let chromium: Chromium | undefined;

/** Ends the browser of a test file: to be called after all of its tests. */
export async function endBrowser(): Promise<void> {
  await chromium?.end();
  chromium = undefined;
}

/** A tab of a browser. */
export class Browser implements Disposable {
  /** What it complains of: scripts that fail, policies that are violated, what cannot be loaded. */
  readonly complaints: string[] = [];
  /** Seconds in which everything comes; a busy machine takes long, and that is no failure. */
  patience = 180;

  private constructor(
    private readonly view: Bun.WebView,
    private readonly options: BrowserOptions,
  ) {}

  static async open(options: BrowserOptions = {}): Promise<Browser> {
    const { width = 1180, height = 900, dark = false, scripts = true, zone = "UTC" } = options;
    const argv = ["--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"];
    const { path, profile } = (chromium ??= new Chromium());
    const browser: Browser = new Browser(
      new Bun.WebView({
        ...{ width, height },
        backend: { type: "chrome", path, argv, url: false },
        dataStore: { directory: profile },
        console: (kind: string, ...what: unknown[]) => {
          if (kind === "error" || kind === "warn") browser.complaints.push(what.join(" "));
        },
      }),
      options,
    );
    const { view } = browser;
    // Only a page that has been shown can be told more.
    await browser.#within("Chromium starts", view.navigate("about:blank"));
    view.addEventListener("Log.entryAdded", (event) => {
      const { entry } = (event as MessageEvent<{ entry: { level: string; text: string } }>).data;
      if (entry.level === "error") browser.complaints.push(entry.text);
    });
    view.addEventListener("Runtime.exceptionThrown", (event) => {
      browser.complaints.push(JSON.stringify((event as MessageEvent).data));
    });
    const tell = async (method: string, params: Record<string, unknown> = {}) => {
      await browser.#within(method, view.cdp(method, params));
    };
    await tell("Log.enable");
    await tell("Network.clearBrowserCookies");
    await tell("Emulation.setTimezoneOverride", { timezoneId: zone });
    const scheme = { name: "prefers-color-scheme", value: dark ? "dark" : "light" };
    await tell("Emulation.setEmulatedMedia", { features: [scheme] });
    await tell("Emulation.setScriptExecutionDisabled", { value: !scripts });
    return browser;
  }

  /** Waits for something. @throws {Error} with what the page says, when it fails or does not come */
  async #within<T>(what: string, task: Promise<T>, seconds = this.patience): Promise<T> {
    const late = Promise.withResolvers<never>();
    const fail = () => late.reject(new Error(`not within ${seconds} s`));
    const timer = setTimeout(fail, 1000 * seconds);
    try {
      return await Promise.race([task, late.promise]);
    } catch (error) {
      const why = error instanceof Error ? error.message : String(error);
      const complaints = this.complaints.length > 0 ? `\nit complains: ${this.complaints}` : "";
      throw new Error(`${what}: ${why}\n${await this.#says()}${complaints}`, { cause: error });
    } finally {
      clearTimeout(timer);
    }
  }

  /** What the page says, as far as it still can. */
  async #says(): Promise<string> {
    const expression = "`${location.href} says: ${document.body?.innerText.slice(0, 3000)}`";
    try {
      const asked = this.view.cdp<{ result: { value: string } }>("Runtime.evaluate", {
        expression,
      });
      const found = await Promise.race([asked, Bun.sleep(60_000)]);
      return found?.result.value ?? "the page does not answer";
    } catch (error) {
      return `the page cannot be asked (${error}); Chromium wrote ${chromium?.log}`;
    }
  }

  /** What a script in the page comes to; that works without scripts, too. */
  async ask<T>(script: string): Promise<T> {
    return await this.#within(script, this.view.evaluate<T>(script));
  }

  /** Has a script run in each page from now on, before its own. */
  async before(source: string): Promise<void> {
    const added = this.view.cdp("Page.addScriptToEvaluateOnNewDocument", { source });
    await this.#within("a script", added);
  }

  async go(url: string | URL): Promise<void> {
    await this.#within(`${url} loads`, this.view.navigate(String(url)));
  }

  /** Waits until the page's script has brought the newest since now. */
  async refreshed(): Promise<void> {
    // The second begins when the first has been shown.
    const script = `globalThis.awaited = new Promise((resolve) => {
      let left = 2;
      const observer = new PerformanceObserver((list) => {
        left -= list.getEntries().filter(({ initiatorType }) => initiatorType === "fetch").length;
        if (left > 0) return;
        observer.disconnect();
        resolve();
      });
      observer.observe({ type: "resource" });
    })`;
    await this.#within("the script brings the newest", this.view.evaluate(script));
  }

  /** Loses its cookies, as when a session ends. */
  async signOut(): Promise<void> {
    await this.#within("cookies go", this.view.cdp("Network.clearBrowserCookies"));
  }

  /** The text of an element as a person sees it; `undefined`: there is none. */
  async text(selector: string): Promise<string | undefined> {
    const found = await this.ask<string | null>(
      `document.querySelector(${JSON.stringify(selector)})?.innerText ?? null`,
    );
    return found?.replace(/\s+/g, " ").trim();
  }

  /** The address of the page. */
  async url(): Promise<string> {
    return await this.ask("location.href");
  }

  /** What a screen reader finds on the page, in its order. */
  async accessible(): Promise<{ role: string; name: string; level: number | undefined }[]> {
    interface Node {
      ignored: boolean;
      role?: { value: string };
      name?: { value: string };
      properties?: { name: string; value: { value: unknown } }[];
    }
    const tree = this.view.cdp<{ nodes: Node[] }>("Accessibility.getFullAXTree");
    const { nodes } = await this.#within("the tree for screen readers", tree);
    const seen = nodes.filter(({ ignored, role }) => !ignored && role);
    return seen.map(({ role, name, properties = [] }) => ({
      role: role!.value,
      name: name?.value ?? "",
      level: properties.find((one) => one.name === "level")?.value.value as number | undefined,
    }));
  }

  /** Waits until the text of an element matches: by itself; without scripts, by looking again. */
  async until(selector: string, pattern: RegExp): Promise<void> {
    const what = `${selector} comes to match ${pattern}`;
    if (this.options.scripts === false) {
      return await this.#within(what, this.#lookAgain(selector, pattern), 2 * this.patience);
    }
    // Kept by the page: else it may be collected while nobody there waits for it.
    const script = `globalThis.awaited = new Promise((resolve) => {
      const check = () => {
        const text = document.querySelector(${JSON.stringify(selector)})?.innerText ?? "";
        if (!${pattern}.test(text.replace(/\\s+/g, " "))) return;
        observer.disconnect();
        resolve();
      };
      const observer = new MutationObserver(check);
      const what = { subtree: true, childList: true, attributes: true, characterData: true };
      observer.observe(document, what);
      check();
    })`;
    await this.#within(what, this.view.evaluate(script));
  }

  async #lookAgain(selector: string, pattern: RegExp): Promise<void> {
    const look = async () => (await this.text(selector)) ?? "";
    if (pattern.test(await look())) return;
    const again = async () => {
      await this.go(await this.url());
      return await look();
    };
    await until("another text", again, (text) => pattern.test(text), this.patience);
  }

  /** Activates a link, button or summary by the keyboard: that needs no place to hit. */
  async press(selector: string): Promise<void> {
    await this.focus(selector);
    await this.key("Enter");
  }

  async key(name: string): Promise<void> {
    await this.#within(`the key ${name}`, this.view.press(name));
  }

  async focus(selector: string): Promise<void> {
    const quotedSelector = JSON.stringify(selector);
    const script = `(document.querySelector(${quotedSelector})?.focus(),
      document.activeElement?.matches(${quotedSelector}) ?? false)`;
    const focus = this.view.evaluate<boolean>(script).then((isFocused) => {
      if (!isFocused) throw new Error("nothing there that can have the focus");
    });
    await this.#within(`the focus on ${selector}`, focus);
  }

  /** Activates an element, and waits for the page that this leads to. */
  async follow(selector: string): Promise<void> {
    await this.leave(selector, () => this.press(selector));
  }

  /** Does something that leads to another page, and waits for that. @param what in words */
  async leave(what: string, act: () => Promise<void>): Promise<void> {
    await this.ask("void (globalThis.isLeft = true)");
    await act();
    // Without scripts, no event of the page tells when it was read.
    const look = async () => {
      const asked = this.view.evaluate<string>("globalThis.isLeft ? '' : document.readyState");
      return await asked.catch((error: unknown) => {
        // Between two pages there is none to ask.
        if (/navigated|context/i.test(String(error))) return "";
        throw error;
      });
    };
    const arrived = until("another page", look, (found) => found === "complete", this.patience);
    await this.#within(`${what} leads to another page`, arrived, 2 * this.patience);
  }

  /** Types into a field, in the place of what is in it. */
  async type(selector: string, text: string): Promise<void> {
    await this.focus(selector);
    await this.ask("document.activeElement.select()");
    if (text === "") await this.key("Delete");
    else await this.#within(`typing into ${selector}`, this.view.type(text));
  }

  /** Keeps a screenshot of the whole page, when that is asked for. */
  async shoot(name: string): Promise<void> {
    if (IS_SHOWN) await Bun.write(resolve(SCREENSHOTS, `${name}.png`), await this.picture());
  }

  /** A picture of the whole page, or of as much of it as is so high. */
  async picture(
    format: "png" | "webp" = "png",
    quality = 80,
    highest = 4000,
  ): Promise<Uint8Array<ArrayBuffer>> {
    const { width = 1180, height = 900 } = this.options;
    const all = await this.ask<number>("document.documentElement.scrollHeight");
    const resize = async (to: number) => {
      await this.#within("a resize", this.view.resize(width, to));
    };
    await resize(Math.min(all, highest));
    const taken = this.view.screenshot({ format, quality, encoding: "blob" });
    const picture = await this.#within("a screenshot", taken);
    await resize(height);
    return await picture.bytes();
  }

  [Symbol.dispose](): void {
    this.view.close();
  }
}
