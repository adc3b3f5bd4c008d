/**
 * Requests a second of `bun ota.ts serve`, beside nginx serving the same bytes as files, and beside a
 * `Bun.serve` that does nothing but return them.
 */

import {
  cpuOf,
  inRounds,
  median,
  missing,
  put,
  ratio,
  scratch,
  serve,
  table,
  whole,
  type Effort,
} from "./harness.ts";
import { bare, nginx, wrk } from "./peers.ts";
import { noise, source, sources, withFixes, writeFiles } from "./trees.ts";

interface Competitor {
  origin: string;
  pid: number;
}

/** What one competitor did in all rounds. */
interface Result {
  /** Requests a second. */
  rates: number[];
  /** Microseconds of CPU for a request. */
  costs: number[];
}

export async function benchServer({ rounds, quick }: Effort): Promise<void> {
  if (missing("server", ["wrk", "nginx"]).length > 0) return;
  const root = scratch("server/releases");
  const small = noise(4096, 1);
  const large = noise(2_000_000, 2);
  const old = sources(198);
  // Three releases of 200 files: nothing is as in the first, and five sources change in the last.
  const other = [...old].map(([path], i) => [path, source(1000 + i)] as const);
  const assets = (seed: number) =>
    [
      ["flash/small.bin", seed === 0 ? noise(4096, 9) : small],
      ["flash/large.bin", seed === 0 ? noise(2_000_000, 10) : large],
    ] as const;
  writeFiles(`${root}/0.9.0`, [...other, ...assets(0)]);
  writeFiles(`${root}/1.0.0`, [...old, ...assets(1)]);
  writeFiles(`${root}/1.0.1`, [...withFixes(old, 5), ...assets(1)]);

  const targets = [
    { name: "manifest, 200 of 200 files", path: "/manifest.json?current_ver=0.9.0" },
    { name: "manifest, 5 of 200 files", path: "/manifest.json?current_ver=1.0.0" },
    { name: "4 KB file", path: "/1.0.1/flash/small.bin" },
    { name: "2 MB file", path: "/1.0.1/flash/large.bin" },
  ];
  await using ota = await serve(root);
  const rows: string[][] = [];
  for (const { name, path } of targets) {
    const bytes = await body(ota.origin + path);
    const files = scratch(`server/nginx-${rows.length}`);
    put(files + path.replace(/\?.*/, ""), bytes);
    await using peer = await nginx(files);
    await using caching = await nginx(files, "open_file_cache max=1000;");
    await using runtime = await bare(ota.origin + path);
    for (const { origin } of [peer, caching, runtime]) {
      if (!bytes.equals(await body(origin + path))) throw new Error(`${path}: not the same bytes`);
    }
    const competitors = [ota, runtime, peer, caching];
    const results = await compete(path, competitors, rounds, quick ? 1 : 2);
    const [us, ...others] = results as [Result, ...Result[]];
    const rates = results.map((result) => whole(median(result.rates)));
    const costs = results.map((result) => median(result.costs).toFixed(1));
    rows.push([
      `${name} (${whole(bytes.length)} B)`,
      ...rates,
      ...others.map((them) => ratio(us.rates, them.rates)),
      costs.join(" / "),
    ]);
  }
  table(
    `Requests a second, wrk -t1 -c32, median of ${rounds} rounds; bare: a Bun.serve that returns the ` +
      `same bytes with the same headers; nginx+ has open_file_cache on; ` +
      `µs of CPU that the server spends on a request`,
    ["", "ota.ts", "bare", "nginx", "nginx+", "/ bare", "/ nginx", "/ nginx+", "µs of CPU, each"],
    rows,
  );
}

/** @returns what each did, in their order */
async function compete(
  path: string,
  competitors: readonly Competitor[],
  rounds: number,
  seconds: number,
): Promise<Result[]> {
  const results = competitors.map((): Result => ({ rates: [], costs: [] }));
  for (const { origin } of competitors) await wrk(origin + path, 1); // Warm.
  const measures = competitors.map(({ pid, origin }, i) => async () => {
    const before = cpuOf(pid);
    const { rate, count } = await wrk(origin + path, seconds);
    results[i]!.rates.push(rate);
    results[i]!.costs.push(((cpuOf(pid) - before) / count) * 1e6);
  });
  await inRounds(rounds, measures);
  return results;
}

async function body(url: string): Promise<Buffer> {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} answered ${response.status}`);
  return Buffer.from(await response.arrayBuffer());
}
