import TestSupport
import Testing

@testable import Transport

@Suite struct PCIFunctionTests {
  private var function = PCIFunction(deviceID: 2, vectors: 3)

  private func read(_ offset: Int, _ width: Int = 4) -> UInt64 { function.read(offset, width, isPending: false) }

  @Test(arguments: [
    (1, 0x1041, 0x02_0000), (2, 0x1042, 0x01_0000), (3, 0x1043, 0x07_8000), (4, 0x1044, 0x00_ff00),
  ]) func everyTypeHasItsNumberAndClass(type: Int, number: Int, code: Int) {
    let function = PCIFunction(deviceID: UInt32(type), vectors: 2)
    func read(_ offset: Int, _ width: Int) -> Int { Int(function.read(offset, width, isPending: false)) }
    #expect(read(0, 2) == 0x1af4)
    #expect(read(2, 2) == number)
    #expect(read(8, 1) == 1)
    #expect(read(9, 1) | read(10, 2) << 8 == code)
    #expect(read(0x0e, 1) == 0)
    #expect(read(0x2c, 2) == 0x1af4)
    #expect(read(0x2e, 2) >= 0x40)
    #expect(read(0x3d, 1) == 1)
  }

  @Test mutating func barShowsItsSizeAndKeepsItsPlace() {
    function.write(0x10, 4, 0xffff_ffff)
    #expect(read(0x10) == 0xffff_c000)
    function.write(0x10, 4, 0xf300_5000)
    #expect(read(0x10) == 0xf300_4000)
    // Byte by byte, as a guest may.
    for (index, byte) in [UInt64(0xff), 0x80, 0x11, 0xf4].enumerated() { function.write(0x10 + index, 1, byte) }
    #expect(read(0x10) == 0xf411_8000)
    for bar in 1...5 {
      function.write(0x10 + 4 * bar, 4, 0xffff_ffff)
      #expect(read(0x10 + 4 * bar) == 0)
    }
    function.write(0x30, 4, 0xffff_ffff)
    #expect(read(0x30) == 0)
  }

  @Test mutating func memoryIsDecodedWhileTheCommandSaysSo() {
    function.write(0x10, 4, 0xf300_0000)
    #expect(function.memory == nil)
    function.write(4, 2, 0xffff)
    #expect(read(4, 2) == 0x0406)
    #expect(function.memory == 0xf300_0000...0xf300_3fff)
    function.write(4, 1, 0)
    #expect(function.memory == nil)
    #expect(function.isINTxDisabled)
  }

  @Test func statusShowsCapabilitiesAndAPendingInterrupt() {
    #expect(read(6, 2) == 0x10)
    #expect(function.read(6, 2, isPending: true) == 0x18)
  }

  @Test func capabilitiesAreAListThatEnds() {
    var place = Int(read(0x34, 1))
    var found: [Int: Int] = [:]
    var types: [Int: (offset: Int, length: Int)] = [:]
    var count = 0
    while place != 0, count < 20 {
      count += 1
      #expect(place >= 0x40 && place & 3 == 0)
      found[Int(read(place, 1))] = place
      if read(place, 1) == 9 {
        #expect(place + Int(read(place + 2, 1)) <= 256)
        #expect(read(place + 4, 1) == 0)
        types[Int(read(place + 3, 1))] = (Int(read(place + 8)), Int(read(place + 12)))
      }
      place = Int(read(place + 1, 1))
    }
    #expect(types.keys.sorted() == [1, 2, 3, 4, 5])
    let ranges = types.filter { $0.key != 5 }.values.sorted { $0.offset < $1.offset }
    for (lower, higher) in zip(ranges, ranges.dropFirst()) { #expect(lower.offset + lower.length <= higher.offset) }
    #expect((ranges.last.map { $0.offset + $0.length } ?? .max) <= Int(PCILayout.bytes))
    #expect(types[1]?.length ?? 0 >= 0x3c)
    let msix = found[0x11] ?? 0
    #expect(read(msix + 2, 2) == 2)
    #expect(read(msix + 4) & 7 == 0 && read(msix + 8) & 7 == 0)
  }

  @Test mutating func controlOfMSIXHasTwoBits() {
    function.write(0x42, 2, 0xffff)
    #expect(read(0x42, 2) == 0xc002)
    #expect(function.isMSIXEnabled && function.isMSIXMasked)
    function.write(0x43, 1, 0x80)
    #expect(function.isMSIXEnabled && !function.isMSIXMasked)
  }

  @Test(arguments: [
    (0, 0, 1, true), (0, 0x3ffc, 4, true), (0, 0x3ffd, 4, false), (0, 0x4000, 1, false), (1, 0, 4, false),
    (0, 2, 4, false), (0, 0, 8, false), (0, 0, 0, false), (0, 0xffff_ffff, 1, false), (0, 0x1002, 2, true),
  ]) func windowTakesWhatTheSpecificationHas(bar: Int, offset: Int, length: Int, isGood: Bool) {
    let window = PCIFunction.Window(bar: UInt8(bar), offset: UInt32(offset), length: UInt32(length))
    #expect((window.access != nil) == isGood)
  }

  @Test func whatIsSavedIsRestored() {
    var random = SeededGenerator(seed: 5)
    var function = function
    for _ in 0..<500 { function.write(Int.random(in: 0..<256, using: &random), 4, random.next()) }
    var other = PCIFunction(deviceID: 2, vectors: 3)
    other.restore(function.saved)
    #expect(other == function)
    // Damaged words do no harm.
    other.restore([UInt32](repeating: .max, count: 8))
    #expect(other.read(4, 2, isPending: false) == 0x0406)
  }

  /// Whatever is written with any width at any offset: what is read-only stays, reads of any width agree with those of bytes.
  @Test(arguments: UInt64(1)...50) func anyAccessesLeaveWhatIsReadOnly(seed: UInt64) {
    var random = SeededGenerator(seed: seed)
    var function = function
    func bytes() -> [UInt8] { (0..<256).map { UInt8(function.read($0, 1, isPending: false)) } }
    let before = bytes()
    let writable: Set<Int> = Set([4, 5, 0x11, 0x12, 0x13, 0x3c, 0x43] + [0x98] + Array(0x9c..<0xa8))
    for _ in 0..<2000 {
      let offset = Int.random(in: -2..<260, using: &random)
      let width = [0, 1, 2, 3, 4, 8, 9].randomElement(using: &random) ?? 4
      if offset >= 0 { function.write(offset, width, random.next()) }
      let place = Int.random(in: 0..<252, using: &random)
      let whole = function.read(place, 4, isPending: false)
      let parts = (0..<4).reduce(UInt64(0)) {
        $0 | function.read(place + $1, 1, isPending: false) << UInt64(8 * $1)
      }
      #expect(whole == parts, "seed \(seed), offset \(place)")
    }
    let after = bytes()
    for index in 0..<256 where !writable.contains(index) {
      #expect(before[index] == after[index], "seed \(seed), offset \(index)")
    }
    #expect(function.read(256, 4, isPending: false) == 0xffff_ffff)
  }
}
