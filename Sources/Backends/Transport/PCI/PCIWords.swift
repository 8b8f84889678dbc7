/// Registers of 32 bits that are accessed with any width at any offset.
enum PCIWords {
  /// The little-endian value of `width` bytes, at most 8, from `offset` on.
  static func read(_ offset: Int, _ width: Int, word: (_ index: Int) -> UInt32) -> UInt64 {
    var value: UInt64 = 0
    for index in 0..<min(max(width, 0), 8) {
      let place = offset &+ index
      value |= UInt64(word(place >> 2) >> UInt32(8 * (place & 3)) & 0xff) << UInt64(8 * index)
    }
    return value
  }

  /// Takes a write apart: for each word that it touches, the value in its place and a mask of the bytes that are written.
  static func write(
    _ offset: Int, _ width: Int, _ value: UInt64, to word: (_ index: Int, _ value: UInt32, _ mask: UInt32) -> Void
  ) {
    var index = 0
    let width = min(max(width, 0), 8)
    while index < width {
      let number = (offset &+ index) >> 2
      var (bytes, mask): (UInt32, UInt32) = (0, 0)
      while index < width, (offset &+ index) >> 2 == number {
        let shift = UInt32(8 * ((offset &+ index) & 3))
        bytes |= UInt32(truncatingIfNeeded: value >> UInt64(8 * index) & 0xff) << shift
        mask |= 0xff << shift
        index += 1
      }
      word(number, bytes, mask)
    }
  }
}

extension UInt32 {
  /// The bits of `mask` from `value`, the others as they are.
  func replaced(by value: UInt32, _ mask: UInt32) -> UInt32 { self & ~mask | value & mask }
}
