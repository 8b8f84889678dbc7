import CLinux
package import EventLoop
import Glibc

/// One client. Confined to the server's thread.
package final class ControlConnection {
  private let descriptor: OwnedDescriptor
  private let methods: ControlMethods
  package let caller: ControlCaller
  private let history: EventHistory
  private var reader = FrameReader()
  private var outgoing: [UInt8] = []
  private var sent = 0
  var token: EventLoop.Token?
  /// What of `held` is in the server's sum.
  var counted = 0
  package private(set) var isSubscribed = false
  /// The first event that a slow subscriber missed; 0 when it missed none.
  private var missedFrom: Int64 = 0
  /// The last event that it was sent, or missed.
  private var lastEvent: Int64 = 0
  /// The client is gone, or is to be dropped.
  package var isOver = false
  /// The client sends no more; it still gets what it asked for, and a subscriber its events, until it closes altogether.
  private var hasEnded = false
  /// The client takes no more: what it has sent is still done.
  private var isGone = false
  /// Messages that were read and wait for room for their answers, from `next` on.
  private var pending: [FrameReader.Item] = []
  private var next = 0
  /// Bytes of the pending messages.
  private var unread = 0
  /// When the client last took something of what waits for it, or nothing waited: monotonic nanoseconds.
  private(set) var lastProgress = EventLoop.now()
  /// Messages answered at a time, so that one client with many does not delay others; fewer when they take long.
  private static let turn = 16
  private static let turnNanoseconds: UInt64 = 2_000_000
  /// Bytes that may wait for a client; one that lets more pile up is dropped.
  package static let outgoingLimit = 8 << 20
  /// Above this no further request is read until some of it is taken.
  private static let outgoingPause = 1 << 20
  /// Above this a subscriber's events are left out, and it is told so.
  private static let eventPause = 1 << 18

  package init(
    _ descriptor: consuming OwnedDescriptor, methods: ControlMethods, caller: ControlCaller, history: EventHistory
  ) {
    self.descriptor = descriptor
    self.methods = methods
    self.caller = caller
    self.history = history
  }

  var raw: Int32 { descriptor.raw }

  private var waiting: Int { outgoing.count - sent }

  var isWaiting: Bool { waiting > 0 }

  /// Bytes that are kept for the client: what waits to be sent, and what it sent and was not answered yet.
  package var held: Int { outgoing.count + unread + reader.held }

  private var hasPending: Bool { next < pending.count }

  private var mayAnswer: Bool { waiting < Self.outgoingPause && hasPending }

  /// Writable also means: its turn again.
  var interest: UInt32 {
    (waiting > 0 || mayAnswer ? EPOLLOUT.rawValue : 0)
      | (waiting < Self.outgoingPause && !hasPending && !hasEnded ? EPOLLIN.rawValue : 0)
  }

  package func receive() {
    guard !hasPending, !hasEnded else { return }
    (pending, next, unread) = ([], 0, 0)
    var buffer = [UInt8](repeating: 0, count: 65536)
    let count = read(raw, &buffer, buffer.count)
    if count < 0 && errno != EAGAIN && errno != EINTR { isOver = true }
    if count == 0 {
      hasEnded = true
      if let last = reader.finish() { pending.append(last) }
    }
    if count > 0 { pending += reader.append(buffer[..<count]) }
    for case .message(let message) in pending { unread += message.count }
  }

  /// The client no longer reads.
  func hungUp() {
    isGone = true
    (outgoing, sent) = ([], 0)
  }

  /// Answers some of what was read, as far as there is room.
  private func work() {
    var left = Self.turn
    let end = EventLoop.now() + Self.turnNanoseconds
    while left > 0, mayAnswer, left == Self.turn || EventLoop.now() < end {
      left -= 1
      next += 1
      switch pending[next - 1] {
      case .message(let message): answer(message)
      case .tooLong:
        send(
          ControlMethods.reply(
            error: .invalidRequest(
              "the message is longer than \(FrameReader.limit) bytes", field: "message",
              remedy: "send messages of at most 1 MiB"), id: .null))
      }
    }
    if !hasPending { (pending, next, unread) = ([], 0, 0) }
  }

  private func answer(_ message: [UInt8]) {
    var replayAfter: Int64?
    let answer = methods.answer(message, from: caller) { parameters throws(ControlFault) in
      let after = parameters["after"]?.integerValue
      guard after ?? 0 >= 0 else {
        throw .invalidParameters("'after' must be the number of an event, 0 or more", field: "after")
      }
      isSubscribed = true
      lastEvent = history.last
      replayAfter = after
      return ["subscribed": true, "epoch": .string(history.epoch), "sequence": .integer(history.last)]
    }
    if let answer { send(answer) }
    if let replayAfter { replay(after: replayAfter) }
  }

  /// - Parameter after: any number from 0 on; that of a daemon's past life may be larger than all of this one.
  private func replay(after: Int64) {
    guard after < history.last else { return }
    if after + 1 < history.first { sendDropped(from: after + 1, to: history.first - 1) }
    for (sequence, event) in history.events(after: after) { send(event: event, sequence) }
  }

  /// Passes an event on; one that a slow client has no room for is left out.
  package func send(event: JSONValue, _ sequence: Int64) {
    lastEvent = sequence
    guard missedFrom == 0, waiting < Self.eventPause else {
      if missedFrom == 0 { missedFrom = sequence }
      return
    }
    send(["jsonrpc": "2.0", "method": "event", "params": event])
  }

  private func sendDropped(from: Int64, to: Int64) {
    send([
      "jsonrpc": "2.0", "method": "event.dropped", "params": ["from": .integer(from), "to": .integer(to)],
    ])
  }

  private func send(_ message: JSONValue) {
    guard !isGone else { return }
    if waiting == 0 { lastProgress = EventLoop.now() }
    outgoing.append(contentsOf: JSONText.text(message).utf8)
    outgoing.append(0x0a)
    if waiting > Self.outgoingLimit { isOver = true }
  }

  /// Answers and sends what can be; afterwards `isOver` says whether the connection has come to its end.
  package func flush() {
    work()
    push()
    defer { if hasEnded && !hasPending && waiting == 0 && (!isSubscribed || isGone) { isOver = true } }
    guard waiting == 0, missedFrom != 0, !isOver else { return }
    sendDropped(from: missedFrom, to: lastEvent)
    missedFrom = 0
    push()
  }

  private func push() {
    while waiting > 0 && !isOver {
      let count = outgoing.withUnsafeBytes { bytes in
        Glibc.send(raw, bytes.baseAddress.map { $0 + sent }, waiting, Int32(MSG_NOSIGNAL))
      }
      if count < 0 {
        if errno == EINTR { continue }
        if errno != EAGAIN { hungUp() }
        break
      }
      sent += count
      lastProgress = EventLoop.now()
    }
    if waiting == 0 {
      outgoing.removeAll(keepingCapacity: outgoing.count < 65536)
      sent = 0
    } else if sent >= Self.outgoingPause {
      // A client that always leaves something would have all that it ever got kept here.
      outgoing.removeFirst(sent)
      sent = 0
    }
  }
}

/// The last events, for clients that come back. Confined to the server's thread.
package final class EventHistory {
  private static let limit = 4096
  /// Tells the numbers of this daemon from those of an earlier one.
  let epoch: String
  private var events: [JSONValue] = []
  /// The number of the oldest event that is kept; of the next one when none is.
  private(set) var first: Int64 = 1

  package init() {
    var time = timespec()
    clock_gettime(CLOCK_REALTIME, &time)
    epoch = String(UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec), radix: 36)
  }

  /// The number of the newest event; 0 when there was none.
  var last: Int64 { first + Int64(events.count) - 1 }

  /// Numbers an event and keeps it.
  package func add(_ event: JSONValue) -> (JSONValue, Int64) {
    let sequence = last + 1
    var time = timespec()
    clock_gettime(CLOCK_REALTIME, &time)
    var members = event.objectValue ?? []
    members.append(.init(name: "sequence", value: .integer(sequence)))
    members.append(
      .init(name: "milliseconds", value: .integer(Int64(time.tv_sec) * 1000 + Int64(time.tv_nsec) / 1_000_000)))
    let numbered = JSONValue.object(members)
    events.append(numbered)
    if events.count > Self.limit {
      events.removeFirst(Self.limit / 4)
      first += Int64(Self.limit / 4)
    }
    return (numbered, sequence)
  }

  func events(after: Int64) -> [(Int64, JSONValue)] {
    guard after < last else { return [] }
    let start = max(after + 1, first)
    return (start...last).map { ($0, events[Int($0 - first)]) }
  }
}
