# The addresses in code of an ESP32-C3 or another with RISC-V: JAL, and LUI and AUIPC
# with what completes them within 64 bytes. See ota_fields.py.

from ota_fields import added


@micropython.viper
def scan(
    o: object,
    at: int,
    stop: int,
    end: int,
    size: int,
    base: int,
    shift: int,
    first: object,
    absolute: object,
    relative: object,
) -> int:
    b = ptr8(o)
    while at < stop:
        if at + 8 > end:
            return end
        if b[at] & 3 != 3:
            at += 2
            continue
        kind = b[at] & 0x7F
        if kind == 0x6F:  # JAL
            to = (b[at + 3] & 0x7F) << 4 | (b[at + 2] & 0xE0) >> 4 | (b[at + 2] & 0x10) << 7
            to |= (b[at + 2] & 15) << 16 | (b[at + 1] & 0xF0) << 8
            to -= (b[at + 3] >> 7) << 20
            low = base + at + to
            add = int(added(relative, low >> 16, low & 0xFFFF)) - shift
            to += add
            if add != 0 and to & 1 == 0 and (to + 0x100000) >> 21 == 0:
                b[at + 1] = b[at + 1] & 15 | (to >> 8) & 0xF0
                b[at + 2] = (to >> 16) & 15 | (to >> 7) & 0x10 | (to << 4) & 0xE0
                b[at + 3] = (to >> 4) & 0x7F | (to >> 13) & 0x80
        target = b[at] >> 7 | (b[at + 1] & 15) << 1
        if (kind == 0x37 or kind == 0x17) and target != 0:  # LUI, AUIPC
            page = (b[at + 1] & 0xF0) << 8 | b[at + 2] << 16 | b[at + 3] << 24
            table = absolute
            less = 0
            if kind == 0x17:
                page += base + at
                table = relative
                less = base + at + shift
            upper = True
            k = at + 4
            while k + 4 <= at + 64 and k + 4 <= end:
                if b[k] & 3 != 3:
                    k += 2
                    continue
                kind = b[k] & 0x7F
                stores = kind & 0x7B == 0x23
                adds = stores or kind & 0x7B == 3
                if kind == 0x13 or kind == 0x67:  # ADDI, JALR
                    adds = b[k + 1] & 0x70 == 0
                if adds and b[k + 1] >> 7 | (b[k + 2] & 15) << 1 == target:
                    low = b[k + 2] >> 4 | b[k + 3] << 4
                    if stores:
                        low = b[k] >> 7 | (b[k + 1] & 15) << 1 | (b[k + 3] >> 1) << 5
                    low = page + (low ^ 0x800) - 0x800
                    low += int(added(table, low >> 16, low & 0xFFFF)) - less
                    if upper:
                        upper = False
                        high = low + 0x800  # the lower half is signed
                        b[at + 1] = b[at + 1] & 15 | (high >> 8) & 0xF0
                        b[at + 2] = (high >> 16) & 255
                        b[at + 3] = (high >> 24) & 255
                    if stores:
                        b[k] = b[k] & 0x7F | (low & 1) << 7
                        b[k + 1] = b[k + 1] & 0xF0 | (low >> 1) & 15
                        b[k + 3] = b[k + 3] & 1 | (low >> 4) & 0xFE
                    else:
                        b[k + 2] = b[k + 2] & 15 | (low << 4) & 0xF0
                        b[k + 3] = (low >> 4) & 255
                # Stores and branches have no target.
                if not stores and kind != 0x63 and b[k] >> 7 | (b[k + 1] & 15) << 1 == target:
                    break
                k += 4
        at += 4
    return at
