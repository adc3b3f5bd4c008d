/** The programs that ota.ts is measured beside, each as good as its own manual makes it. */

import * as fs from "node:fs";
import { freePort, run, scratch, start, until, which, type Service } from "./harness.ts";

/**
 * nginx with one worker, serving a directory as files.
 *
 * @param settings more lines of its `http` block
 */
export async function nginx(root: string, settings = ""): Promise<Service & { origin: string }> {
  const port = await freePort();
  const home = scratch(`nginx-${port}`);
  fs.mkdirSync(`${home}/temp`, { recursive: true });
  const temps = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
  fs.writeFileSync(
    `${home}/nginx.conf`,
    `daemon off;
worker_processes 1;
pid ${home}/pid;
error_log ${home}/error.log;
${process.getuid?.() === 0 ? "user root;" : ""}
events { worker_connections 4096; }
http {
  types { application/json json; application/octet-stream bin; }
  default_type application/octet-stream;
  ${temps.map((name) => `${name}_temp_path ${home}/temp;`).join("\n  ")}
  access_log off;
  sendfile on;
  tcp_nopush on;
  keepalive_requests 1000000000;
  ${settings}
  server { listen 127.0.0.1:${port}; root ${root}; }
}
`,
  );
  const service = start([
    which("nginx")!,
    "-p",
    home,
    "-c",
    "nginx.conf",
    "-e",
    `${home}/error.log`,
  ]);
  const origin = `http://127.0.0.1:${port}`;
  await until(service, async () => (await fetch(origin)).status > 0);
  return { ...service, origin };
}

/** A `Bun.serve` that answers every request as a URL answers one now; see bare.ts. */
export async function bare(url: string): Promise<Service & { origin: string }> {
  const port = await freePort();
  const service = start([process.execPath, `${import.meta.dir}/bare.ts`, url, `${port}`]);
  const origin = `http://127.0.0.1:${port}`;
  await until(service, async () => (await fetch(origin)).ok);
  return { ...service, origin };
}

/** An rsync daemon with one module, `root`. */
export async function rsyncDaemon(root: string): Promise<Service & { port: number }> {
  const port = await freePort();
  const home = scratch(`rsync-${port}`);
  const owner = process.getuid?.() === 0 ? "uid = root\ngid = root\n" : "";
  fs.writeFileSync(
    `${home}/rsyncd.conf`,
    `use chroot = no\n${owner}log file = ${home}/log\npid file = ${home}/pid\n` +
      `[root]\npath = ${root}\nread only = yes\n`,
  );
  const listen = ["--address=127.0.0.1", `--port=${port}`, `--config=${home}/rsyncd.conf`];
  const service = start(["rsync", "--daemon", "--no-detach", ...listen]);
  const greets = () =>
    run(["rsync", `rsync://127.0.0.1:${port}/`]).then(({ stdout }) => stdout.includes("root"));
  await until(service, greets, 20);
  return { ...service, port };
}

/**
 * Puts load on a URL: one thread, 32 connections that stay open.
 *
 * @returns answered requests a second, all of them with 2xx
 * @throws {Error} when any request failed
 */
export async function wrk(url: string, seconds: number): Promise<{ rate: number; count: number }> {
  const { stdout } = await run(["wrk", "-t1", "-c32", `-d${seconds}s`, url]);
  const found = /(\d+) requests in[\s\S]*Requests\/sec:\s+([\d.]+)/.exec(stdout);
  if (!found || /Non-2xx|Socket errors/.test(stdout)) throw new Error(`wrk ${url}:\n${stdout}`);
  return { rate: Number(found[2]), count: Number(found[1]) };
}
