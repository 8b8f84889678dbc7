import Glibc

/// libFuzzer's entry: hands each input to the target that VXD_FUZZ_TARGET names.
///
/// A target never fails on an input: what libFuzzer looks for are traps, hangs and memory beyond its limit.
@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzOneInput(_ data: UnsafePointer<UInt8>?, _ count: Int) -> Int32 {
  guard let data, count <= 65536 else { return 0 }
  target(UnsafeBufferPointer(start: data, count: count))
  return 0
}

/// Every target by its name; `Tests/Fuzz/run` lists the same ones.
private let targets: [String: @Sendable (UnsafeBufferPointer<UInt8>) -> Void] = [
  "split-ring": RingTarget.split, "packed-ring": RingTarget.packed, "in-flight": InFlightTarget.run,
  "mmio": RegisterTarget.run, "pci": PCITarget.run, "blk": BlockTarget.run, "net": NetTarget.run,
  "source-lock": SourceLockTarget.run,
  "console": ConsoleTarget.run, "nbd": NBDTarget.run, "xenstore": EntryTarget.run, "xenbus": SetupTarget.run,
  "json-rpc": ControlTarget.run, "control": ConnectionTarget.run,
]

/// What the environment chose, once.
private let target: @Sendable (UnsafeBufferPointer<UInt8>) -> Void = {
  let name = getenv("VXD_FUZZ_TARGET").map { String(cString: $0) } ?? ""
  guard let target = targets[name] else {
    fatalError("VXD_FUZZ_TARGET is one of \(targets.keys.sorted().joined(separator: ", ")), not '\(name)'")
  }
  return target
}()

/// What a target has no use for goes here: the compiler leaves out a call whose result nobody uses when it has no other effect, and what is never
/// called is never tried.
@inline(never) @_optimize(none) func consume<Value>(_ value: Value) {}

/// Reads an input front to back; zeros follow its end.
struct Input {
  private let bytes: UnsafeBufferPointer<UInt8>
  private var position = 0

  init(_ bytes: UnsafeBufferPointer<UInt8>) { self.bytes = bytes }

  var isEmpty: Bool { position >= bytes.count }

  mutating func byte() -> UInt8 {
    guard position < bytes.count else { return 0 }
    defer { position += 1 }
    return bytes[position]
  }

  mutating func number(bytes count: Int) -> UInt64 {
    (0..<count).reduce(0) { value, _ in value << 8 | UInt64(byte()) }
  }

  /// What is left.
  mutating func rest() -> UnsafeBufferPointer<UInt8> {
    defer { position = bytes.count }
    return UnsafeBufferPointer(rebasing: bytes[min(position, bytes.count)...])
  }
}
