import Glibc

/// Memory of zeroes that takes up no page until it is used: tables of a queue that are made for its largest load, and mostly carry a small one.
///
/// `malloc` gives memory back that others have touched, and then the whole of a table counts: with a thousand disks a quarter of a GiB.
package struct UntouchedMemory: ~Copyable {
  package let start: UnsafeMutableRawPointer
  private let bytes: Int
  private var given = 0

  /// - Parameter bytes: of all that `take` is asked for, each rounded up to 64. Ends the process when there is no address space for it, as an
  ///   allocation does.
  package init(bytes: Int) {
    self.bytes = max(1, bytes)
    let mapped = mmap(
      nil, self.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    guard let mapped, mapped != MAP_FAILED else { fatalError("no address space for \(bytes) bytes") }
    start = mapped
    // A whole huge page would be taken for the first byte.
    madvise(mapped, self.bytes, Int32(MADV_NOHUGEPAGE))
  }

  deinit { munmap(start, bytes) }

  /// Bytes that `take` uses for a table.
  package static func bytes<Element: BitwiseCopyable>(_ type: Element.Type, _ count: Int) -> Int {
    (count * MemoryLayout<Element>.stride + 63) & ~63
  }

  /// The next table: a value of which all bits are zero must be one of `Element`'s.
  package mutating func take<Element: BitwiseCopyable>(
    _ type: Element.Type, _ count: Int
  ) -> UnsafeMutablePointer<Element> {
    let place = start + given
    given += Self.bytes(type, count)
    precondition(given <= bytes, "a table is larger than was said")
    return place.bindMemory(to: type, capacity: count)
  }
}
