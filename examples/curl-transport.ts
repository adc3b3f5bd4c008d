import { type TransferResponse, OTA, TransferError, type TransferRequest } from "../ota.ts";

/** A device that fetches with curl, for networks that only curl gets through. */
export class CurlOTA extends OTA {
  server = process.env.SERVER ?? "http://127.0.0.1:8000";

  override async connect(): Promise<void> {}

  override async getData(path: string, { signal }: TransferRequest): Promise<TransferResponse> {
    const url = new URL(path, this.server).href;
    const curl = Bun.spawn(["curl", "--fail", "--silent", url], { signal, stdout: "pipe" });
    const content = await new Response(curl.stdout).blob();
    if ((await curl.exited) !== 0) throw new TransferError(`curl cannot get ${url}`, true);
    return { body: content.stream(), offset: 0, encoding: "identity", headers: new Headers() };
  }
}

if (import.meta.main) {
  console.log(await new CurlOTA({ root: "./device", ver: "1.0.0" }).update());
}
