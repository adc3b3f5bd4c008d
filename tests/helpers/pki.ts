/** Keys and certificates for tests, made by openssl: what a user has, who does not use `keygen`. */

import { need } from "./tool.ts";

/** Runs openssl to its end. */
export function openssl(args: readonly string[]): { code: number; stdout: string; stderr: string } {
  const ran = Bun.spawnSync([need("openssl"), ...args], { stdin: "ignore" });
  return { code: ran.exitCode, stdout: ran.stdout.toString(), stderr: ran.stderr.toString() };
}

/** Runs openssl, which must succeed. */
function must(args: readonly string[]): void {
  const { code, stderr } = openssl(args);
  if (code !== 0) throw new Error(`openssl ${args.join(" ")}: ${stderr}`);
}

/** Files of a certificate for HTTPS, all PEM. */
export interface Certified {
  /** The certificate of the authority that signed it. */
  ca: string;
  cert: string;
  key: string;
}

/**
 * Makes an authority, and a certificate that it signed.
 *
 * @param directory where the files go
 * @param names such as `IP:127.0.0.1` or `DNS:ota.test`
 */
export function certify(directory: string, names: string): Certified {
  const at = (name: string) => `${directory}/${name}`;
  const newKey = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
  const forDays = ["-days", "2"];
  must(
    ["req", "-x509", ...newKey, ...forDays, "-subj", "/CN=Test authority"].concat(
      ["-keyout", at("ca.key")],
      ["-out", at("ca.pem")],
    ),
  );
  must(
    ["req", "-x509", ...newKey, ...forDays, "-subj", "/CN=server"].concat(
      ["-CA", at("ca.pem"), "-CAkey", at("ca.key")],
      ["-addext", `subjectAltName=${names}`, "-addext", "basicConstraints=critical,CA:FALSE"],
      ["-keyout", at("tls.key"), "-out", at("tls.pem")],
    ),
  );
  return { ca: at("ca.pem"), cert: at("tls.pem"), key: at("tls.key") };
}
