/**
 * What the runtime allows: a `Bun.serve` that gives one answer, the one that a URL gives, and does
 * nothing else. `bun tests/bench/bare.ts URL PORT`
 */

const [url, port] = process.argv.slice(2) as [string, string];
// As wrk gets it, which accepts no coding.
const response = await fetch(url, { headers: { "Accept-Encoding": "identity" } });
const body = new Blob([await response.arrayBuffer()]);
const headers = new Headers(response.headers);
// Bun adds these itself.
for (const name of ["date", "content-length", "connection"]) headers.delete(name);
const init = { status: response.status, headers };

Bun.serve({
  port: Number(port),
  hostname: "127.0.0.1",
  development: false,
  fetch: () => new Response(body, init),
});
