/** `bun ota.ts` as a process of its own, as a person runs it. */

import { fileURLToPath } from "node:url";

const OTA = fileURLToPath(new URL("../../ota.ts", import.meta.url));

/** How a process ended. */
export interface Ended {
  code: number;
  stdout: string;
  stderr: string;
}

function spawn(args: readonly string[], cwd?: string) {
  const command = [process.execPath, OTA, ...args];
  // What hangs must not outlive the tests; nothing else takes so long, however busy the machine is.
  const limits = { timeout: 570_000, killSignal: "SIGKILL" } as const;
  return Bun.spawn(command, { cwd, ...limits, stdin: "ignore", stdout: "pipe", stderr: "pipe" });
}

/** Runs a command to its end. */
export async function runOta(args: readonly string[], cwd?: string): Promise<Ended> {
  await using child = spawn(args, cwd);
  const [stdout, stderr, code] = await Promise.all([
    child.stdout.text(),
    child.stderr.text(),
    child.exited,
  ]);
  return { code, stdout, stderr };
}

/** A `serve` that listens. */
export interface ServeProcess extends AsyncDisposable {
  /** Where it listens, on 127.0.0.1. */
  url: string;
  /** What it printed until it listened. */
  startup: string;
  /** Sends a signal. */
  kill(signal: "SIGTERM" | "SIGINT"): void;
  /** Waits for its end. */
  ended(): Promise<Ended>;
}

/**
 * Starts `bun ota.ts serve --port 0` and waits until it has printed that it listens.
 *
 * @throws {Error} with all that it printed, when it ends before that
 */
export async function startServe(args: readonly string[], cwd?: string): Promise<ServeProcess> {
  const child = spawn(["serve", "--port", "0", ...args], cwd);
  const stderr = child.stderr.text();
  const reader = child.stdout.getReader();
  const decoder = new TextDecoder();
  let stdout = "";
  const read = async (): Promise<boolean> => {
    const { done, value } = await reader.read();
    if (value) stdout += decoder.decode(value, { stream: true });
    return !done;
  };
  const ended = async (): Promise<Ended> => {
    while (await read());
    return { code: await child.exited, stdout, stderr: await stderr };
  };
  // The line with `curl` is the last one of the start.
  while (!/^try .*\n/m.test(stdout)) {
    if (!(await read())) throw new Error(`serve ended early: ${JSON.stringify(await ended())}`);
  }
  const url = / at (http:\S+)\n/.exec(stdout)?.[1];
  if (url === undefined) throw new Error(`expected an address in ${JSON.stringify(stdout)}`);
  return {
    url,
    startup: stdout,
    kill: (signal) => child.kill(signal),
    ended,
    [Symbol.asyncDispose]: async () => {
      child.kill("SIGKILL");
      await child.exited;
    },
  };
}
