import EventLoop
import Glibc

/// A guest that keeps many requests under way and checks everything about their answers: each request is answered once, with status ok;
/// each read returns what was written to its block last; nothing is lost.
package final class CheckingGuest {
  /// What went wrong; the first thing ends the load.
  package struct Failure: Error, CustomStringConvertible {
    package let description: String
  }

  private struct Place {
    var block = 0
    var isWrite = false
    var version: UInt64 = 0
    var isFlush = false
  }

  /// A request's memory: header, status, then 4 KiB of data.
  private static let stride: UInt64 = 8192
  private static let blockBytes = 4096

  private let domain: SimulatedDomain
  package let driver: SimulatedDriver
  private let indirect: Bool
  private let queue: Int
  private let area: UInt64
  /// Version that each block has, and whether a request is under way for it.
  private var versions: [UInt64]
  private var isBusy: [Bool]
  private var places: [Place]
  private var free: [Int]
  private var byHead: [UInt16: Int] = [:]
  private var random: UInt64
  private var nextVersion: UInt64 = 1
  package private(set) var answered: UInt64 = 0

  /// - Parameters:
  ///   - depth: requests under way.
  ///   - blocks: blocks of 4 KiB that are used, all zero at first.
  ///   - area: guest memory, 8 KiB for each request.
  package init(
    domain: SimulatedDomain, driver: SimulatedDriver, queue: Int = 0, depth: Int, blocks: Int, area: UInt64,
    seed: UInt64
  ) {
    self.domain = domain
    self.driver = driver
    self.queue = queue
    self.area = (area + 4095) & ~4095
    indirect = driver.features.contains(.indirectDescriptors)
    versions = Array(repeating: 0, count: blocks)
    isBusy = Array(repeating: false, count: blocks)
    places = Array(repeating: Place(), count: depth)
    free = Array(0..<depth)
    random = seed &* 2 &+ 1
  }

  private func next(_ limit: Int) -> Int {
    // xorshift64*
    random ^= random >> 12
    random ^= random << 25
    random ^= random >> 27
    return Int(truncatingIfNeeded: (random &* 0x2545_F491_4F6C_DD1D) >> 33) % limit
  }

  private func address(_ place: Int) -> UInt64 { area + UInt64(place) * Self.stride }

  // Loops over words are written for unoptimized builds, in which they are most of a guest's work.

  /// What all words of a block's version have in common; each has its number added by exclusive or.
  private func pattern(_ block: Int, _ version: UInt64) -> UInt64 {
    version &* 0x9E37_79B9_7F4A_7C15 ^ UInt64(block) << 40
  }

  private func write(_ block: Int, _ version: UInt64, to memory: UnsafeMutableRawPointer) {
    let words = memory.assumingMemoryBound(to: UInt64.self)
    let common = pattern(block, version)
    var word: UInt64 = 0
    var place = words
    while word < 512 {
      place.pointee = common ^ word
      place += 1
      word += 1
    }
  }

  /// The first word that is not what a version of a block has; nil when all are. Version 0 is all zeros.
  private func mistake(_ block: Int, _ version: UInt64, in memory: UnsafeMutableRawPointer) -> Int? {
    let common = pattern(block, version)
    let mask: UInt64 = version == 0 ? 0 : .max
    var word: UInt64 = 0
    var place = memory.assumingMemoryBound(to: UInt64.self)
    while word < 512 {
      if place.pointee != (common ^ word) & mask { return Int(word) }
      place += 1
      word += 1
    }
    return nil
  }

  /// Makes requests until all places are in use.
  package func fill() throws(Failure) {
    while let place = free.last {
      var block = next(versions.count)
      var tries = 0
      while isBusy[block] && tries < versions.count {
        block = (block + 1) % versions.count
        tries += 1
      }
      let kind = next(16)
      let start = address(place)
      let status = start + 16
      let data = start + UInt64(Self.blockBytes)
      driver.memory.pointer(status).storeBytes(of: 0xee, as: UInt8.self)
      let header = driver.memory.pointer(start)
      header.storeBytes(of: 0, toByteOffset: 4, as: UInt32.self)
      header.storeBytes(of: UInt64(block) * 8, toByteOffset: 8, as: UInt64.self)
      var buffers: [SimulatedDriver.Buffer] = [.init(start, 16, writable: false)]
      let memory = driver.memory.pointer(data)
      if kind == 0 || isBusy[block] {
        header.storeBytes(of: 4, as: UInt32.self)
        header.storeBytes(of: 0, toByteOffset: 8, as: UInt64.self)
        places[place] = Place(block: -1, isFlush: true)
      } else if kind < 8 {
        header.storeBytes(of: 0, as: UInt32.self)
        memset(memory, 0x55, Self.blockBytes)
        buffers.append(.init(data, UInt32(Self.blockBytes), writable: true))
        places[place] = Place(block: block, version: versions[block])
      } else {
        header.storeBytes(of: 1, as: UInt32.self)
        let version = nextVersion
        nextVersion += 1
        write(block, version, to: memory)
        buffers.append(.init(data, UInt32(Self.blockBytes), writable: false))
        places[place] = Place(block: block, isWrite: true, version: version)
      }
      buffers.append(.init(status, 1, writable: true))
      guard let head = driver.add(buffers, indirect: indirect, queue: queue) else { return }
      guard byHead.updateValue(place, forKey: head) == nil else {
        throw Failure(description: "the ring gave head \(head) twice")
      }
      if places[place].block >= 0 { isBusy[places[place].block] = true }
      free.removeLast()
    }
  }

  /// Takes what is answered, and checks it.
  ///
  /// - Returns: how many answers there were.
  package func reap() throws(Failure) -> Int {
    var count = 0
    while let used = driver.takeUsed(queue: queue) {
      guard let place = byHead.removeValue(forKey: used.head) else {
        throw Failure(description: "head \(used.head) was answered, which is not under way: twice?")
      }
      try check(place, used.length)
      free.append(place)
      count += 1
      answered += 1
    }
    return count
  }

  private func check(_ number: Int, _ length: UInt32) throws(Failure) {
    let place = places[number]
    let start = address(number)
    let status = driver.memory.pointer(start + 16).load(as: UInt8.self)
    guard status == 0 else { throw Failure(description: "a request of block \(place.block) has status \(status)") }
    guard !place.isFlush else { return }
    isBusy[place.block] = false
    guard !place.isWrite else {
      versions[place.block] = place.version
      return
    }
    guard length == UInt32(Self.blockBytes) + 1 else {
      throw Failure(description: "a read of block \(place.block) has used length \(length)")
    }
    let memory = driver.memory.pointer(start + UInt64(Self.blockBytes))
    if let word = mistake(place.block, place.version, in: memory) {
      let found = memory.load(fromByteOffset: word * 8, as: UInt64.self)
      throw Failure(
        description:
          "block \(place.block), word \(word): 0x\(String(found, radix: 16)) is not version \(place.version)")
    }
  }

  /// Keeps requests under way until `isOver` says so, then waits for the last answers.
  ///
  /// - Parameter patience: seconds without an answer that are too many.
  package func run(patience: Int = 30, until isOver: () -> Bool) throws(Failure) {
    var deadline = EventLoop.now() &+ UInt64(patience) &* 1_000_000_000
    while true {
      let over = isOver()
      if !over {
        try fill()
        driver.notifyIfWanted(queue: queue)
      }
      if over && byHead.isEmpty { return }
      if try reap() > 0 {
        deadline = EventLoop.now() &+ UInt64(patience) &* 1_000_000_000
        continue
      }
      if driver.armInterrupt(queue: queue) { continue }
      guard EventLoop.now() < deadline else {
        throw Failure(description: "\(byHead.count) requests have had no answer for \(patience) s")
      }
      if domain.waitForInterrupt(seconds: 1) { _ = driver.acknowledgeInterrupt() }
    }
  }
}
