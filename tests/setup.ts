/**
 * Sees to it that the programs that the tests run are here: Debian's packages, installed when they
 * are missing and we may. Run by `bun run test`; needs nothing but Bun itself.
 */

/** Program → the Debian package that has it. */
const NEEDED: Record<string, string> = {
  chromium: "chromium",
  curl: "curl",
  initdb: "postgresql",
  mount: "mount",
  nginx: "nginx-light",
  openssl: "openssl",
  setpriv: "util-linux",
  strace: "strace",
  zstd: "zstd",
};

/** Debian has PostgreSQL's programs below a directory for each version. */
const path = () => {
  const versions = new Bun.Glob("/usr/lib/postgresql/*/bin").scanSync({ onlyFiles: false });
  return [process.env.PATH ?? "", "/usr/sbin", "/sbin", ...versions].join(":");
};
const missing = () =>
  Object.keys(NEEDED).filter((name) => Bun.which(name, { PATH: path() }) === null);

const packages = missing().map((name) => NEEDED[name]!);
if (packages.length > 0) {
  const install = `apt-get update && apt-get install -y --no-install-recommends ${packages.join(" ")}`;
  if (process.getuid?.() === 0 && Bun.which("apt-get")) {
    console.error(`installing ${packages.join(" ")}`);
    const env = { ...process.env, DEBIAN_FRONTEND: "noninteractive" };
    Bun.spawnSync(["sh", "-c", install], { env, stdout: "ignore", stderr: "inherit" });
  }
  if (missing().length > 0) {
    console.error(`the tests need ${missing().join(", ")}; on Debian, as root: ${install}`);
    process.exit(1);
  }
}
