/** Fleets as they would be after some time, without a server and without that time. */

import { Fleet } from "../../ota.ts";

/** What a device said, and when. */
export interface Said {
  id: string;
  version?: string;
  /** Milliseconds ago. */
  ago?: number;
  method?: "GET" | "HEAD";
  /** What else was in its query. */
  query?: Record<string, string>;
  /** What it was offered. */
  to?: string;
}

/** Lays a store in which devices have said this, in this order; 1.0.1 is the newest. */
export async function layFleet(url: string, all: readonly Said[]): Promise<void> {
  const end = Date.now();
  let now = 0;
  await using fleet = await Fleet.open({
    ...{ url, serving: true, tick: 0, newest: () => ({ version: "1.0.1", firmware: null }) },
    clock: { now: () => now, elapsed: () => now },
  });
  for (const { id, version = "1.0.0", ago = 3600_000, method = "GET", query, to } of all) {
    now = end - ago;
    const offer = to === undefined ? null : { version: to, firmware: null };
    fleet.note({
      ...{ method, path: "/manifest.json", peer: "10.0.0.1", address: "10.0.0.1" },
      ...{ status: 200, sent: 1, milliseconds: 1 },
      query: { devid: id, current_ver: version, ...query },
      asked: { model: "", isKnown: true, offer },
    });
  }
  now = end;
  await fleet.flush();
}
