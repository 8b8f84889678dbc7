import CAIO
import EventLoop
import Glibc

/// The pattern of the benchmark straight on libaio: what a program without any guest gets from the same file.
struct BareAIO {
  /// - Returns: requests per second.
  static func run(descriptor: Int32, pattern: Pattern, seconds: Double) -> Double {
    var context: io_context_t?
    guard io_setup(Int32(pattern.depth), &context) == 0 else { fatalError("io_setup") }
    defer { io_destroy(context) }
    let depth = pattern.depth
    let blocks = UnsafeMutablePointer<iocb>.allocate(capacity: depth)
    blocks.initialize(repeating: iocb(), count: depth)
    let pointers = UnsafeMutablePointer<UnsafeMutablePointer<iocb>?>.allocate(capacity: depth)
    let events = UnsafeMutablePointer<io_event>.allocate(capacity: depth)
    events.initialize(repeating: io_event(), count: depth)
    let buffers = UnsafeMutableRawPointer.allocate(byteCount: depth * 4096, alignment: 4096)
    memset(buffers, 1, depth * 4096)
    defer {
      blocks.deallocate()
      pointers.deallocate()
      events.deallocate()
      buffers.deallocate()
    }
    var random = pattern.random
    func prepare(_ slot: Int) {
      let offset = Int64(pattern.offset(&random))
      if pattern.isWrite {
        io_prep_pwrite(blocks + slot, descriptor, buffers + slot * 4096, 4096, offset)
      } else {
        io_prep_pread(blocks + slot, descriptor, buffers + slot * 4096, 4096, offset)
      }
      blocks[slot].data = UnsafeMutableRawPointer(bitPattern: slot + 1)
    }
    for slot in 0..<depth {
      prepare(slot)
      pointers[slot] = blocks + slot
    }
    var ready = depth
    var done = 0
    let start = EventLoop.now()
    let end = start + UInt64(seconds * 1e9)
    while EventLoop.now() < end {
      var submitted = 0
      while submitted < ready {
        let count = io_submit(context, ready - submitted, pointers + submitted)
        guard count > 0 else { fatalError("io_submit: \(count)") }
        submitted += Int(count)
      }
      let count = Int(io_getevents(context, 1, depth, events, nil))
      for index in 0..<count {
        guard events[index].res == 4096 else { fatalError("a request failed") }
        let slot = Int(bitPattern: events[index].data) - 1
        prepare(slot)
        pointers[index] = blocks + slot
      }
      ready = count
      done += count
    }
    return Double(done) * 1e9 / Double(EventLoop.now() - start)
  }
}
