/**
 * What must be true of a device: plain data, which knows of releases, files and what was promised,
 * and nothing of journals. A step makes of one model those in which the device may be afterwards.
 */

import { LooseVersion } from "../../ota.ts";
import { areAtOdds, differences, isSame, passes, type File, type Tree } from "./releases.ts";

/** A device. A model is never changed, only followed by another. */
export interface Model {
  /** What it is on; `null`: nothing. */
  version: string | null;
  /** What that release consists of: these files are the updater's, all others the application's. */
  release: Tree;
  /** What is on its disk. */
  tree: Tree;
  /** The active image, with the hash of what is in the slot. */
  firmware: Image | null;
  /** What `rollback` may end with: any of these. Empty: it must refuse. */
  backs: readonly Model[];
  /** `rollback` may refuse, too: its backups are lost, or what was promised does not cover it. */
  mayRefuse: boolean;
  /** Nobody can say what a rollback does: an old `.ota` was put back. */
  isUnclear: boolean;
  /** Every path that the updater has had a hand in since it was on `backs`. */
  since: ReadonlySet<string>;
  /** Content changed under the version since it was installed. */
  isMixed: boolean;
  /** Names what was installed last, and so what `rollback` remembers as failed. */
  offer: string;
  /** What was offered and failed. */
  failed: ReadonlySet<string>;
  /** An update has made a record. */
  isRecorded: boolean;
}

export interface Image {
  version: string;
  hash: string;
}

/** What a server offers. */
export interface Offered {
  newest: { version: string; tree: Tree } | undefined;
  image: Image | undefined;
}

/** What a step may end with. */
export interface Expected {
  /** The device is then one of these. */
  endings: Model[];
  /** What `client` may call it. */
  results: string[];
  /** It may fail with exit code 1, and the device is as it was: an application's file is in the way. */
  mayFail: boolean;
  /** What is being installed, if anything; while its check has not ended, the device is this. */
  next?: Model;
  isGood: boolean;
  offer: string;
}

export function isNewer(a: string, b: string | null): boolean {
  return b === null || new LooseVersion(a).compare(b) > 0;
}

/** Whether a file is as a release has it. One that its owner lets run stays so. */
function isAs(file: File | undefined, wanted: File | undefined): boolean {
  return file?.hash === wanted?.hash && (!wanted?.executable || !!file?.executable);
}

/** Files of a release that are not on the disk as they should be. */
export function damaged({ release, tree }: Model): string[] {
  return [...release].filter(([path, file]) => !isAs(tree.get(path), file)).map(([path]) => path);
}

/** The files of a release as they are then on the disk of a device. */
function laid(release: Tree, old: Model): [string, File][] {
  return [...release].map(([path, file]) => {
    const ran = old.tree.get(path)?.executable && !old.release.get(path)?.executable;
    return [path, { ...file, executable: file.executable || !!ran }];
  });
}

/** What a device takes to be of a release, when it knows no more than what that consists of. */
export function adopted(list: Tree | undefined, tree: Tree): Tree {
  const found = [...(list ?? [])].flatMap(([path, { executable }]): [string, File][] => {
    const file = tree.get(path);
    return file ? [[path, { ...file, executable }]] : [];
  });
  return new Map(found);
}

/** The application's own files. */
function own({ release, tree }: Model): [string, File][] {
  return [...tree].filter(([path]) => !release.has(path));
}

/** The application's files of which a release needs the place: it has another one there. */
export function displaced(old: Model, release: Tree): [string, File][] {
  return own(old).filter(
    ([path, { hash }]) => release.has(path) && release.get(path)!.hash !== hash,
  );
}

/** The application's files that would have to be directories for a release, or the reverse. */
export function inTheWay(old: Model, release: Tree): string[] {
  const needed = [...release.keys()];
  return own(old)
    .map(([path]) => path)
    .filter((path) => needed.some((other) => areAtOdds(path, other)));
}

/** What one run of `client` does, undisturbed. */
export function afterUpdate(
  old: Model,
  { newest, image }: Offered,
  { check, retry, without }: { check: boolean; retry: boolean; without: ReadonlySet<string> },
): Expected {
  const target = newest && !isNewer(old.version ?? "", newest.version) ? newest : undefined;
  const version = target?.version ?? old.version;
  const isSameVersion = version === old.version;
  const isSameContent = !target || differences(target.tree, old.release).length === 0;
  const isNewImage = image !== undefined && isNewer(image.version, old.firmware?.version ?? null);
  const isBrokenImage =
    image?.version === old.firmware?.version && image?.hash !== old.firmware?.hash;
  const firmware = isNewImage || isBrokenImage ? image! : old.firmware;

  const blocking = target ? inTheWay(old, target.tree) : [];
  const mine = own(old).filter(([path]) => !blocking.includes(path));
  const tree: Tree = target ? new Map([...mine, ...laid(target.tree, old)]) : old.tree;
  const isChange = differences(tree, old.tree).length > 0 || firmware !== old.firmware;
  const isRepair = isSameVersion && isSameContent && !isNewImage;
  const files = [...(target?.tree ?? [])]
    .map(([path, { hash }]) => path + hash)
    .sort()
    .join();
  const content = isSameVersion && isSameContent ? "-" : Bun.hash(files);
  const offer = `${version} ${content} ${isNewImage ? image.hash : "-"}`;
  // What a rollback then remembers: the firmware that came with it is still part of that.
  const isChanged = isSameVersion && !isNewImage;
  const kept = isChanged ? `${version} ${content} ${old.offer.split(" ")[2] ?? "-"}` : offer;
  const stay = { endings: [old], mayFail: blocking.length > 0, isGood: true, offer };
  if (isSameVersion && isSameContent && !isChange) {
    return { ...stay, results: ["up to date"], endings: [old, { ...old, isRecorded: true }] };
  }
  const before = damaged(old).length > 0 ? [old, { ...old, ...repaired(old) }] : [old];
  if (old.failed.has(offer) && !retry) {
    return { ...stay, endings: before, results: ["not tried", "repaired"] };
  }
  const isGood = !check || passes(tree, without);
  // What is older than what it is on is never offered again.
  const failed = new Set([...old.failed].filter((one) => !isNewer(version!, one.split(" ")[0]!)));
  const paths = [...old.release.keys(), ...(target?.tree.keys() ?? [])];
  const since = new Set(isChanged ? [...old.since, ...paths] : paths);
  const next: Model = {
    ...{ version, release: target?.tree ?? old.release, tree, firmware, failed, isRecorded: true },
    ...{ offer: isRepair ? old.offer : kept, since },
    // What was damaged and is then not of the release any more cannot be had again.
    isUnclear: isRepair ? old.isUnclear : isChanged && damaged(old).length > 0,
    isMixed: isRepair ? old.isMixed : isChanged,
    // A repair is no release, and neither is content that changed under its version.
    backs: isChanged ? old.backs : before,
    mayRefuse: isRepair ? old.mayRefuse : isSameVersion || !isChange,
  };
  if (isGood) {
    const results = isSameVersion && !isNewImage ? ["repaired", "updated"] : ["updated"];
    return { ...stay, endings: [next], results, next, isGood };
  }
  return { ...stay, endings: afterFailure(old, offer), results: ["rolled back"], next, isGood };
}

/** Whether a device passes the check. */
export function isGoodOn({ tree }: Model, { without }: { without: ReadonlySet<string> }): boolean {
  return passes(tree, without);
}

/** What a device is after its check has failed: as before, and it remembers. */
export function afterFailure(old: Model, offer: string): Model[] {
  const failed = new Set([...old.failed, offer]);
  const back = { ...old, mayRefuse: true, failed };
  return damaged(old).length > 0 ? [back, { ...back, ...repaired(old) }] : [back];
}

/** What it is on may be put right, even where it is not the newest. */
function repaired(old: Model): Pick<Model, "tree" | "isRecorded"> {
  return { tree: new Map([...old.tree, ...laid(old.release, old)]), isRecorded: true };
}

/** Whether nobody can say what a rollback does to each file. */
export function isRollbackUnclear({ isUnclear, isMixed, release, tree }: Model): boolean {
  // Which of the files that others changed since are from before, and which were put right?
  const isChanged = () => [...release].some(([path, file]) => !isSame(file, tree.get(path)));
  return isUnclear || (isMixed && isChanged());
}

/** What `rollback` makes of a device: the releases' files as they were, the others as they are. */
export function afterRollback(now: Model): Model[] {
  return now.backs.flatMap((back) => {
    const isTheirs = (path: string) => now.since.has(path) || back.release.has(path);
    // Where nothing was, what the application has made since stays.
    const others = own(now).filter(([path]) => !isTheirs(path) || !back.tree.has(path));
    const tree = new Map([...others, ...[...back.tree].filter(([path]) => isTheirs(path))]);
    // What was as the release has it, the update left alone: nothing of it was kept.
    for (const [path, file] of laid(now.release, back)) {
      if (!isSame(file, back.tree.get(path))) continue;
      if (now.tree.has(path)) tree.set(path, now.tree.get(path)!);
      else tree.delete(path);
    }
    const failed = new Set([...now.failed, now.offer]);
    const made = { ...back, tree, failed, backs: [], mayRefuse: true };
    // An image that both have may have been damaged meanwhile, or put right.
    const isSameImage = back.firmware?.version === now.firmware?.version;
    return isSameImage ? [made, { ...made, firmware: now.firmware }] : [made];
  });
}

/** Files of either release that the application has changed since the update. */
export function changedSince(now: Model): string[] {
  const releases = [now.release, ...now.backs.map(({ release }) => release)];
  const paths = new Set([...now.since, ...releases.flatMap((release) => [...release.keys()])]);
  return [...paths].filter((path) => !isAs(now.tree.get(path), now.release.get(path)));
}
