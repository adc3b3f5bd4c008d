# What a patch predicts of old content: the addresses in it, moved by a table. Here are
# those in data; ota_thumb.py, ota_xtensa.py and ota_riscv.py know those in code.
# ota_patch.py loads what it needs of them, and reads this text itself on a build that
# makes no machine code, where @ is a syntax error: so each line of a function is one of
# plain Python, too. There, large numbers take room: most are in two halves.
#
# A table is bytes: two that hold the number of its entries, six of nothing, and eight
# for each entry: the first address that it holds for, and what is added there.


@micropython.viper
def added(o: object, high: int, low: int) -> int:
    # What is added to an address, of which these are the halves.
    t = ptr8(o)
    high &= 0xFFFF
    a = 0
    b = t[0] | t[1] << 8
    while a < b:
        m = (a + b + 1) >> 1
        k = m << 3
        h = t[k + 2] | t[k + 3] << 8
        if h < high or h == high and (t[k] | t[k + 1] << 8) <= low:
            a = m
        else:
            b = m - 1
    if a == 0:
        return 0
    k = a << 3
    return ((t[k + 7] ^ 0x80) - 0x80) << 24 | t[k + 6] << 16 | t[k + 5] << 8 | t[k + 4]


@micropython.viper
def word(o: object, at: int, table: object) -> int:
    # Moves the address in a word. Returns by how much, 0 where it stays.
    b = ptr8(o)
    low = b[at] | b[at + 1] << 8
    high = b[at + 2] | b[at + 3] << 8
    add = int(added(table, high, low))
    if add != 0:
        low += add & 0xFFFF
        high += (add >> 16) + (low >> 16)
        b[at] = low & 255
        b[at + 1] = (low >> 8) & 255
        b[at + 2] = high & 255
        b[at + 3] = (high >> 8) & 255
    return add


@micropython.viper
def words(o: object, at: int, stop: int, size: int, first: object, table: object) -> int:
    # Moves the words from `at` to `stop`, of `size` bytes. first says of the highest
    # byte of an address whether it may move. Returns where it stopped.
    b = ptr8(o)
    moves = ptr8(first)
    at = (at + 3) & -4
    while at < stop:
        if moves[b[at + 3]] != 0 and at + 4 <= size:
            word(o, at, table)
        at += 4
    return at
