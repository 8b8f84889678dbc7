import ControlAPI
import EventLoop
import Glibc
import SimulatedXen
import TestSupport
import Testing

/// Threads whose work guests decide have less weight than those that hear operators and look at the whole.
@Suite struct PriorityTests {
  /// The nice value of each of a process's threads (linux: proc_pid_stat(5), field 19), by the thread's name; the main thread's is "main".
  private func niceness(of process: pid_t) -> [String: Int] {
    var result: [String: Int] = [:]
    for task in TemporaryFolder.names("/proc/\(process)/task") {
      guard let file = fopen("/proc/\(process)/task/\(task)/stat", "re") else { continue }
      defer { fclose(file) }
      var bytes = [UInt8](repeating: 0, count: 1024)
      let text = String(decoding: bytes[..<fread(&bytes, 1, bytes.count, file)], as: UTF8.self)
      guard let first = text.firstIndex(of: "("), let last = text.lastIndex(of: ")") else { continue }
      let fields = text[last...].split(separator: " ")
      guard fields.count > 17, let nice = Int(fields[17]) else { continue }
      let name = String(text[text.index(after: first)..<last])
      result[pid_t(task) == process ? "main" : name] = nice
    }
    return result
  }

  @Test func threadsThatGuestsKeepBusyWeighLessThanThoseOfTheDaemon() throws {
    let stage = try DaemonStage(
      profiles:
        #"{"version": 1, "guests": [{"guest": "alpha", "devices": [{"type": "entropy"}, {"type": "console"}]}]}"#)
    _ = try stage.guest(1, name: "alpha", disks: ["xvde"])
    let client = try ControlClient(path: stage.socket)
    #expect(eventually { (try? client.call("device.list"))?.arrayValue?.count == 3 }, "\(stage.daemon.report)")
    // A thread gives itself its name, and then its weight.
    var seen: [String: Int] = [:]
    func ofGuests() -> [String: Int] {
      seen.filter { $0.key.hasPrefix("vxd-guest-") || $0.key.hasPrefix("vxd-alpha/") }
    }
    let isSo = eventually {
      seen = niceness(of: stage.daemon.pid)
      let main = seen["main"] ?? 20
      return ofGuests().count == 4 && ofGuests().allSatisfy { $0.value == min(19, main + LoopThread.guestSteps) }
    }
    #expect(isSo, "\(seen)")
    #expect(seen["vxd-control"] == seen["main"], "\(seen)")
  }

  /// Of a process's main thread; 0 is the calling thread.
  private func nice(_ process: pid_t) -> Int32 { getpriority(__priority_which_t(PRIO_PROCESS.rawValue), id_t(process)) }

  /// Also one that such a thread starts in turn: it has the weight of its like, and no less.
  @Test func threadStartedByAGuestsThreadHasTheSameWeight() throws {
    // The main thread's nice value counts, which the kernel looks up by the process's number.
    let main = nice(getpid())
    let outer = try LoopThread(name: "outer", work: .guests)
    defer { outer.stopAndJoin() }
    nonisolated(unsafe) var found: (Int32, Int32) = (0, 0)
    outer.perform { [self] in
      found.0 = nice(0)
      guard let inner = try? LoopThread(name: "inner", work: .guests) else { return }
      inner.perform { found.1 = nice(0) }
      inner.stopAndJoin()
    }
    let expected = min(19, main + Int32(LoopThread.guestSteps))
    #expect(found == (expected, expected))
  }
}
