# Updates this board over the air: its files and, where the board can, its
# firmware. OTA knows what an update is, WiFiOTA how to get bytes over WiFi; for
# another way write a class with the same methods; report() may be left out.
#
#     from OTA import WiFiOTA
#
#     ota = WiFiOTA("network", "password", "192.168.4.2", 8000)
#     ota.confirm()      # this release works; without it, it is gone after 3 starts
#     ota.connect()
#     ota.update()       # resets the board if there was something newer
#
# update() raises an OSError when something went wrong that may go well another
# time (the network, the disk, the memory), and a ValueError when the server's
# manifest is not what it should be; no other exception.
#
# An update is staged whole in .ota and checked there before anything changes.
# Then ota_boot.py, which updates never replace, renames it into place in steps
# that a reset may cut anywhere. Nothing is ever in memory whole, and what only an
# update needs is loaded for it.

import gc
import sys
import time

import ota_boot

WAIT = 20  # seconds for the WiFi network


def setting(name):
    # VERIFY, MODEL and CA, as config.py of the application says; "" without that.
    try:
        import config
    except ImportError:
        if ota_boot.kind(ota_boot.HOME + "/config.py"):
            raise OSError("config.py cannot be loaded, and may hold keys")
        return ""
    return getattr(config, name, "")


class OTA:
    token = ""  # what `serve --token` wants
    http = False  # does get() send the token, and take what get() of WiFiOTA does?

    # For a transport to write. What goes wrong is an OSError, and tried again.
    # Whoever waits calls alive() meanwhile, at least every 5 seconds.

    def connect(self):
        raise NotImplementedError

    def disconnect(self):
        raise NotImplementedError

    def get(self, path, take):
        # Calls take(piece) for every piece of what the server has at path.
        raise NotImplementedError

    def report(self, path):
        # May be left out. Asks the server for HEAD of path if the network is up, and
        # returns whether it is.
        return False

    def bearer(self):
        # The token, where a header can carry it: in ASCII. Else it is in the query.
        return self.token if self.http and len(self.token.encode()) == len(self.token) else ""

    # For an application to replace.

    def alive(self):
        pass  # called at least every 5 seconds, for a watchdog

    # For an application to call.

    def version(self):
        # The release on this board, "" if that is not known.
        return ota_boot.version()

    def update(self):
        # Installs what the server has that is newer, and resets the board. Returns
        # False when there is nothing. Raises OSError or ValueError, see above, and
        # then nothing has changed, or ota_boot.failure says that it is not undone
        # yet; the next start goes on with that.
        if ota_boot.FORMAT != 1:
            raise OSError("this OTA.py needs another ota_boot.py: install that over a cable")
        if not ota_boot.ran:
            raise OSError("boot.py must call ota_boot.boot(): what would recover this update?")
        state = self.state()
        if state.get("phase", "settle") != "settle":
            raise OSError("%s is on trial: confirm() it first" % state.get("version"))
        try:
            new, switch = self.stage(state)
        except (MemoryError, RuntimeError) as e:
            # The heap or the stack is full; another time there may be more room.
            raise OSError("this update is too large for this board: %r" % e)
        finally:
            for name in ("ota_patch", "ota_reader"):
                sys.modules.pop(name, None)
            gc.collect()
        if not new:
            return False
        ota_boot.save(new)
        ota_boot.install(new, switch)
        print("OTA: %s is installed" % new["version"])
        ota_boot.reset()
        return True

    def stage(self, state):
        import ota_update

        new, firmware = ota_update.stage(self, state)
        if not firmware:
            return new, None
        # There is more room for it without what reads a manifest.
        del ota_update
        for name in ("ota_update", "ota_manifest"):
            del sys.modules[name]
        gc.collect()
        from ota_image import get_firmware

        return new, get_firmware(self, state, new, firmware)

    def confirm(self):
        # This release works and stays. Costs little when it was said before.
        # Raises an OSError when that cannot be recorded. If the network is up, the
        # server hears of it, or that an update was taken back.
        state = self.state()
        phase = state.get("phase")
        if phase == "trial":
            if state.get("slot"):
                ota_boot.mark_valid()
            for key in ("phase", "starts", "seen"):
                state.pop(key, None)
            ota_boot.save(state)
            ota_boot.sweep(lambda part, name: part == state["set"])
            print("OTA: %s is confirmed" % state["version"])
            self.tell(state)
        elif not phase and state.get("failed") and not state.get("told"):
            self.tell(state)

    def tell(self, state):
        # Says once what this board is on. When that fails, or there is no network,
        # the next update() says it: it asks with the same query.
        failed = state.get("failed")
        try:
            import ota_query

            query = ota_query.query(self, self.version(), state.get("firmware"), failed)
            if not self.report("/manifest.json?" + query):
                return
        except Exception as e:
            print("OTA: the server was not told:", e)
        finally:
            for name in ("ota_query", "ota_http"):
                sys.modules.pop(name, None)
            gc.collect()
        if failed:
            try:
                state["told"] = "yes"
                ota_boot.save(state)
            except OSError:
                pass  # then it is said again

    def rollback(self):
        # Goes back to the release before this one, and resets the board. Raises an
        # OSError when there is none, or when going back has to wait for a start.
        state = self.state()
        if not state.get("set"):
            raise OSError("there is no release to go back to")
        ota_boot.back(state, "rollback()")
        ota_boot.reset()

    def state(self):
        ota_boot.alive = self.alive
        state = ota_boot.load()
        # Where the firmware of the release before does not start, an update helps.
        if ota_boot.failure and state.get("phase") != "settle":
            raise OSError("reset the board first: " + ota_boot.failure)
        return state


class WiFiOTA(OTA):
    http = True

    def __init__(self, ssid, password, ip, port, token=""):
        self.ssid = ssid
        self.password = password
        self.ip = ip
        self.port = port
        self.token = token
        self.wlan = None

    def connect(self):
        try:
            import network
        except ImportError:
            return  # a computer, which has its network
        if hasattr(network, "STA_IF"):
            self.wlan = network.WLAN(network.STA_IF)
            self.wlan.active(True)
            if not self.wlan.isconnected():
                self.wlan.connect(self.ssid, self.password)
        else:  # Pycom
            self.wlan = network.WLAN(mode=network.WLAN.STA)
            if not self.wlan.isconnected():
                self.wlan.connect(self.ssid, auth=(network.WLAN.WPA2, self.password))
        for _ in range(WAIT * 10):
            self.alive()
            if self.wlan.isconnected():
                return
            time.sleep(0.1)
        raise OSError("no WiFi network %s" % self.ssid)

    def disconnect(self):
        # Switches WiFi off.
        try:
            import network
        except ImportError:
            return
        if hasattr(network, "STA_IF"):
            self.wlan = network.WLAN(network.STA_IF)
            if self.wlan.active():
                self.wlan.disconnect()
                self.wlan.active(False)
        else:
            network.WLAN().deinit()
            self.wlan = None

    def report(self, path):
        try:
            import network

            if hasattr(network, "STA_IF"):
                self.wlan = network.WLAN(network.STA_IF)
            if not self.wlan or not self.wlan.isconnected():
                return False
        except ImportError:
            pass  # a computer
        self.get(path, None)
        return True

    def get(self, path, take, part=None):
        # part says what is there already: part.tag of the first part.at bytes. With
        # it, part.begin(at, tag) is called when it is clear where the pieces begin.
        import ota_http

        ca = setting("CA")
        ota_http.get(self.ip, self.port, path, take, self.alive, self.bearer(), ca, part)
