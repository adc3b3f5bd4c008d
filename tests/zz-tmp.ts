import { loadMicroPython } from "@micropython/micropython-webassembly-pyscript";
import { readFileSync, readdirSync } from "node:fs";
const dir = process.argv[2]!;
const mp = await loadMicroPython({ heapsize: 1<<20, stdout: (l)=>console.log(l), linebuffer: true });
for (const n of readdirSync(dir)) if (n.endsWith(".py")) mp.FS.writeFile("/"+n, readFileSync(dir+"/"+n));
const code = (s: string) => mp.runPython(s);
code(`import sys, gc, os\nsys.path[:] = ["/"]\ndef look():\n gc.collect(); return gc.mem_alloc()\nlast = 0`);
for (const m of ["ota_boot","OTA","ota_manifest","ota_check","ota_update","ota_http","ota_part","ota_image","ota_slot","ota_coding","ota_patch"]) {
 code(`look()`); code(`last = look()`); code(`try:\n  import ${m}\nexcept ImportError as e:\n  print(e)`); code(`look()`); code(`print("${m}", look() - last)`);
}
code(`import ota_patch`);
for (const k of [1,2,3,4]) { code(`ota_patch.SCANS.clear()`); code(`look()`); code(`last = look()`);  code(`ota_patch.scans(${k})`); code(`look()`); code(`print("scan ${k}", look() - last)`); }
