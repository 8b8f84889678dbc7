import Devices
import EventLoop
import Lifecycle

/// Set rates and achieved ones, over ten seconds each: `vxd-bench rates [FILE]`. A ratio is off the aim when it is more than 2 % from 1.
enum Rates {
  private static let seconds = 10.0

  static func run(_ path: String) throws {
    print("set and achieved rates, \(Int(seconds)) s each, 4 KiB requests at depth 32\n")
    print("limit                         set         achieved    ratio")
    var worst = 0.0
    for (name, isWrite, operations, bytes) in [
      ("reads a second", false, 500, nil), ("reads a second", false, 20_000, nil), ("writes a second", true, 3000, nil),
      ("bytes read a second", false, nil, 8_388_608), ("bytes written a second", true, nil, 52_428_800),
    ] as [(String, Bool, UInt64?, UInt64?)] {
      let rate = RateNode()
      let load = try GuestLoad(path: path, copies: true, inline: false, engine: .ioUring, rate: rate)
      defer { load.stop() }
      var limits = RateLimits()
      if isWrite {
        (limits.writeOperations, limits.writeBytes) = (operations, bytes)
      } else {
        (limits.readOperations, limits.readBytes) = (operations, bytes)
      }
      rate.set(limits)
      let pattern = Pattern(isWrite: isWrite, depth: 32, fileBytes: Bench.fileBytes)
      _ = load.run(pattern, seconds: 0.5)  // the burst
      let result = load.run(pattern, seconds: seconds)
      let achieved = result.requestsPerSecond * (bytes == nil ? 1 : 4096)
      let set = Double(operations ?? bytes ?? 0)
      let ratio = achieved / set
      worst = max(worst, abs(ratio - 1))
      print(
        pad(name, 30) + pad("\(Int(set))", 12) + pad("\(Int(achieved))", 12) + "\(Double(Int(ratio * 10_000)) / 10_000)"
      )
    }
    print(
      "\nfarthest from 1: \(Double(Int(worst * 10_000)) / 100) %\(worst <= 0.02 ? ", within the aim" : ": BEYOND THE AIM of 2 %")"
    )
  }

  private static func pad(_ text: String, _ width: Int) -> String {
    text + String(repeating: " ", count: max(1, width - text.count))
  }
}
