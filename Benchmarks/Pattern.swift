/// Random requests of 4 KiB, all through a run the same for both sides.
struct Pattern {
  var isWrite: Bool
  var depth: Int
  var fileBytes: UInt64

  var name: String { "4 KiB random \(isWrite ? "write" : "read "), depth \(depth)" }

  struct Random {
    var state: UInt64
  }

  var random: Random { Random(state: 0x2545_f491_4f6c_dd1d) }

  func offset(_ random: inout Random) -> UInt64 {
    random.state ^= random.state << 13
    random.state ^= random.state >> 7
    random.state ^= random.state << 17
    return random.state % (fileBytes / 4096) * 4096
  }
}
