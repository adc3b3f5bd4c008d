// The little that these tests use of MicroPython's WebAssembly build, which comes without types.
declare module "@micropython/micropython-webassembly-pyscript" {
  export interface Stream {
    path?: string;
    node: { contents: Uint8Array | null; usedBytes: number };
    flags: number;
  }
  /** A file, or a directory with its entries by name. */
  export interface FileNode {
    mode: number;
    contents: unknown;
  }
  export interface DeviceOps {
    open?(stream: Stream): void;
    close?(stream: Stream): void;
    read?(stream: Stream, buffer: Int8Array, offset: number, length: number): number;
    write?(stream: Stream, buffer: Int8Array, offset: number, length: number): number;
  }
  /** Emscripten's file system, in memory. Everything that Python does to files goes through it. */
  export interface FileSystem {
    root: FileNode;
    ErrnoError: new (errno: number) => Error;
    open(path: string, flags: number | string, mode?: number): Stream;
    close(stream: Stream): void;
    write(
      stream: Stream,
      buffer: Int8Array,
      offset: number,
      length: number,
      position?: number,
    ): number;
    read(
      stream: Stream,
      buffer: Int8Array,
      offset: number,
      length: number,
      position?: number,
    ): number;
    rename(from: string, to: string): void;
    unlink(path: string): void;
    mkdir(path: string, mode?: number): unknown;
    rmdir(path: string): void;
    truncate(path: string, length: number): void;
    readdir(path: string): string[];
    readFile(path: string): Uint8Array;
    writeFile(path: string, data: Uint8Array | string): void;
    stat(path: string): { mode: number; size: number };
    isDir(mode: number): boolean;
    analyzePath(path: string): { exists: boolean };
    makedev(major: number, minor: number): number;
    registerDevice(device: number, ops: DeviceOps): void;
    mkdev(path: string, mode: number, device: number): void;
    getPath(node: Stream["node"]): string;
  }
  export interface MicroPython {
    FS: FileSystem;
    _module: { _malloc(size: number): number; _free(at: number): void };
    runPython(code: string): unknown;
  }
  export function loadMicroPython(options: {
    heapsize?: number;
    linebuffer?: boolean;
    stdout?: (line: string) => void;
    stderr?: (line: string) => void;
  }): Promise<MicroPython>;
}
