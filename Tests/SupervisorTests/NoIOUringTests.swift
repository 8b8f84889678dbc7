import ControlAPI
import Glibc
import TestSupport
import Testing
import Xen

/// A host that does not permit io_uring: by sysctl, or by the system call filter of a service.
@Suite struct NoIOUringTests {
  /// Runs a program whose io_uring_setup (system call 425 everywhere) fails as kernel.io_uring_disabled has it: a filter of four instructions.
  private static let refusing = """
    import ctypes, os, struct, sys
    code = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050000 | 1), (0x06, 0, 0, 0x7fff0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    filter = struct.pack("H6xQ", len(code), ctypes.addressof(program))
    libc = ctypes.CDLL(None, use_errno=True)
    holder = ctypes.create_string_buffer(filter)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(holder)), 0, 0):
        sys.exit("no filter: errno %d" % ctypes.get_errno())
    os.execv(sys.argv[1], sys.argv[1:])
    """

  @Test(.enabled(if: ChildProcess.isInstalled("python3"), "python3 is not installed"), arguments: ["io_uring"])
  func disksAreServedByLibaioAndOperatorsSeeWhy(engine: String) throws {
    let stage = try DaemonStage(
      profiles: #"{"version": 1, "disks": [{"guest": "*", "engine": "\#(engine)"}]}"#,
      under: ["python3", "-c", Self.refusing])
    _ = try stage.guest(1, name: "alpha", disks: ["xvde"])
    let client = try ControlClient(path: stage.socket)
    let device = try client.call("device.get", ["guest": "alpha", "device": "xvde"])
    #expect(device["engine"] == "libaio")
    #expect(device["mode"]?.stringValue?.contains("by libaio: io_uring is not permitted") == true)
    #expect(eventually { stage.daemon.log.contains("io_uring is not permitted") }, "\(stage.daemon.report)")
  }

  @Test(arguments: ["auto", "libaio"]) func diskByLibaioGivesNoReason(engine: String) throws {
    let stage = try DaemonStage(profiles: #"{"version": 1, "disks": [{"guest": "*", "engine": "\#(engine)"}]}"#)
    _ = try stage.guest(1, name: "alpha", disks: ["xvde"])
    let client = try ControlClient(path: stage.socket)
    let device = try client.call("device.get", ["guest": "alpha", "device": "xvde"])
    #expect(device["engine"] == "libaio")
    #expect(device["mode"]?.stringValue?.hasSuffix("by libaio") == true)
  }
}
