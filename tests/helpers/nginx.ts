/** Debian's nginx as a process of one test, on a port of its own. */

import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { Temp } from "./temp.ts";
import { eventually, need } from "./tool.ts";

/** An nginx that listens. */
export class Nginx implements AsyncDisposable {
  readonly #temp: Temp;
  readonly #child: Bun.Subprocess;

  private constructor(
    readonly port: number,
    temp: Temp,
    child: Bun.Subprocess,
  ) {
    this.#temp = temp;
    this.#child = child;
  }

  /**
   * @param origin the server in front of which it caches
   * @param cache directives of the location beside `proxy_pass` and `proxy_cache`
   * @param more other locations
   */
  static async caching(origin: string, port: number, cache: string, more = ""): Promise<Nginx> {
    const temp = new Temp();
    mkdirSync(temp.at("logs"));
    const directories = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(
      (name) => `${name}_temp_path ${temp.at(name)};`,
    );
    writeFileSync(
      temp.at("nginx.conf"),
      `daemon off;
${process.getuid?.() === 0 ? "user root;" : ""}
worker_processes 1;
pid ${temp.at("pid")};
error_log ${temp.at("error.log")} warn;
events { worker_connections 1024; }
http {
  access_log off;
  ${directories.join("\n  ")}
  proxy_cache_path ${temp.at("cache")} keys_zone=ota:1m;
  server {
    listen 127.0.0.1:${port};
    location / {
      proxy_pass ${origin};
      proxy_cache ota;
      ${cache}
      add_header X-Cache $upstream_cache_status always;
    }
    ${more}
  }
}
`,
    );
    const command = [program(), "-p", temp.path, "-c", temp.at("nginx.conf")];
    const child = Bun.spawn([...command, "-e", temp.at("error.log")], {
      stdio: ["ignore", "ignore", "ignore"],
    });
    const nginx = new Nginx(port, temp, child);
    try {
      let isUp = false;
      const ask = () => {
        if (child.exitCode !== null) throw new Error(`nginx ended: ${nginx.errors}`);
        void fetch(nginx.url).then(
          () => (isUp = true),
          () => {},
        );
        return isUp;
      };
      await eventually("nginx answers", ask);
    } catch (error) {
      await nginx[Symbol.asyncDispose]();
      throw error;
    }
    return nginx;
  }

  get url(): string {
    return `http://127.0.0.1:${this.port}`;
  }

  /** What it has to complain of. */
  get errors(): string {
    return readFileSync(this.#temp.at("error.log"), "utf8");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#child.kill("SIGTERM"); // It ends its workers, which a SIGKILL would leave behind.
    await this.#child.exited;
    this.#temp[Symbol.dispose]();
  }
}

/** Debian has it where only root looks. */
function program(): string {
  return Bun.which("nginx", { PATH: "/usr/sbin:/sbin" }) ?? need("nginx");
}
