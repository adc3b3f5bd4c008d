/** A TCP proxy that counts. */

import { connect, createServer } from "node:net";

/** What went through: bytes of TCP's payload, so headers of HTTP are in and those of TCP are not. */
export interface Traffic {
  /** From the clients to the server. */
  up: number;
  /** From the server to the clients. */
  down: number;
  connections: number;
}

/** A proxy that is listening on 127.0.0.1. */
export interface CountingProxy extends AsyncDisposable {
  readonly port: number;
  readonly traffic: Traffic;
}

/** Starts a proxy in front of a port on 127.0.0.1. */
export function countingProxy(target: number): Promise<CountingProxy> {
  const traffic: Traffic = { up: 0, down: 0, connections: 0 };
  const server = createServer({ allowHalfOpen: true }, (client) => {
    traffic.connections++;
    const upstream = connect({ port: target, host: "127.0.0.1", allowHalfOpen: true });
    client.on("data", (chunk: Uint8Array) => (traffic.up += chunk.byteLength));
    upstream.on("data", (chunk: Uint8Array) => (traffic.down += chunk.byteLength));
    client.pipe(upstream).pipe(client);
    client.on("error", () => upstream.destroy());
    upstream.on("error", () => client.destroy());
  });
  return new Promise((done, fail) => {
    server.once("error", fail);
    server.listen(0, "127.0.0.1", () => {
      const address = server.address();
      const port = typeof address === "object" && address ? address.port : 0;
      done({
        port,
        traffic,
        [Symbol.asyncDispose]: async () => void server.close(),
      });
    });
  });
}
