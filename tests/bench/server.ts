/** Requests a second of `bun ota.ts serve`, beside nginx serving the same bytes as files. */

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
import { nginx, wrk } from "./peers.ts";
import { noise, source, sources, withFixes, writeFiles } from "./trees.ts";

interface Competitor {
  name: string;
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
    if (!bytes.equals(await body(peer.origin + path)))
      throw new Error(`${path}: not the same bytes`);
    const ours = { name: "ota.ts", origin: ota.origin, pid: ota.pid };
    const theirs = { name: "nginx", origin: peer.origin, pid: peer.pid };
    const results = await compete(path, [ours, theirs], rounds, quick ? 1 : 2);
    const [us, them] = [results.get(ours)!, results.get(theirs)!];
    rows.push([
      `${name} (${whole(bytes.length)} B)`,
      whole(median(us.rates)),
      whole(median(them.rates)),
      ratio(us.rates, them.rates),
      median(us.costs).toFixed(1),
      median(them.costs).toFixed(1),
    ]);
  }
  table(
    `Requests a second, wrk -t1 -c32, median of ${rounds} rounds; CPU of the server for a request`,
    ["", "ota.ts", "nginx", "ratio", "ota.ts µs", "nginx µs"],
    rows,
  );
}

async function compete(
  path: string,
  competitors: Competitor[],
  rounds: number,
  seconds: number,
): Promise<Map<Competitor, Result>> {
  const results = new Map<Competitor, Result>();
  for (const competitor of competitors) {
    results.set(competitor, { rates: [], costs: [] });
    await wrk(competitor.origin + path, 1); // Warm: compiled code, caches, connections.
  }
  const measures = competitors.map((competitor) => async () => {
    const before = cpuOf(competitor.pid);
    const { rate, count } = await wrk(competitor.origin + path, seconds);
    const result = results.get(competitor)!;
    result.rates.push(rate);
    result.costs.push(((cpuOf(competitor.pid) - before) / count) * 1e6);
  });
  await inRounds(rounds, measures);
  return results;
}

async function body(url: string): Promise<Buffer> {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} answered ${response.status}`);
  return Buffer.from(await response.arrayBuffer());
}
