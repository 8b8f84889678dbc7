import Devices
import EventLoop
import Glibc

/// What goes over the connection: requests out, several in one call; replies in, data straight into the requests' vectors.
extension NBDEngine {
  // MARK: Sending

  func send() {
    while sendCount > 0, let raw = descriptor?.raw {
      let count = gather()
      var message = msghdr()
      message.msg_iov = vectors
      message.msg_iovlen = count
      let sent = sendmsg(raw, &message, Int32(MSG_NOSIGNAL))
      if sent < 0 {
        if errno == EINTR { continue }
        if errno == EAGAIN { return watch(writable: true) }
        return lose("the connection to the NBD server broke: \(Errno.last)")
      }
      advance(sent)
    }
    watch(writable: false)
  }

  private func bytesToSend(_ tag: Int) -> Int {
    let operation = operations[tag]
    guard operation.request.operation == .write, operation.flushingAfter < 0 else { return NBDProtocol.requestBytes }
    return NBDProtocol.requestBytes &+ dataBytes(tag)
  }

  /// What is to be sent next, as vectors.
  private func gather() -> Int {
    var count = 0
    var skip = sentOfFirst
    func add(_ start: UnsafeMutableRawPointer?, _ length: Int) {
      guard skip < length else {
        skip &-= length
        return
      }
      vectors[count] = iovec(iov_base: start.map { $0 + skip }, iov_len: length &- skip)
      skip = 0
      count &+= 1
    }
    for position in 0..<sendCount {
      let tag = Int(sendQueue[(sendFirst &+ position) % depth])
      let operation = operations[tag]
      let hasData = operation.request.operation == .write && operation.flushingAfter < 0
      let needed = 1 &+ (hasData ? operation.request.vectorCount : 0)
      guard count &+ needed <= Self.vectorCapacity else { break }
      add(headers + 32 &* tag, NBDProtocol.requestBytes)
      guard hasData else { continue }
      for index in 0..<operation.request.vectorCount {
        add(operation.request.vectors[index].start, operation.request.vectors[index].length)
      }
    }
    return count
  }

  private func advance(_ sent: Int) {
    var rest = sent &+ sentOfFirst
    while sendCount > 0 {
      let tag = Int(sendQueue[sendFirst])
      let bytes = bytesToSend(tag)
      guard rest >= bytes else { break }
      rest &-= bytes
      operations[tag].phase = .sent
      sendFirst = (sendFirst &+ 1) % depth
      sendCount &-= 1
    }
    sentOfFirst = rest
  }

  // MARK: Receiving

  func receive() {
    while let raw = descriptor?.raw {
      var count = 0
      if receivingTag >= 0 { count = gatherReceive() }
      vectors[count] = iovec(
        iov_base: replyHeader + replyHeaderBytes, iov_len: NBDProtocol.replyBytes &- replyHeaderBytes)
      let got = readv(raw, vectors, Int32(truncatingIfNeeded: count &+ 1))
      if got < 0 {
        if errno == EINTR { continue }
        if errno == EAGAIN { return }
        return lose("the connection to the NBD server broke: \(Errno.last)")
      }
      guard got > 0 else { return lose("the NBD server hung up") }
      guard take(got) else { return lose("the NBD server's reply is malformed") }
    }
  }

  private func gatherReceive() -> Int {
    let request = operations[receivingTag].request
    var count = 0
    var skip = receivedBytes
    for index in 0..<request.vectorCount {
      let vector = request.vectors[index]
      if skip >= vector.length {
        skip &-= vector.length
        continue
      }
      guard count < Self.vectorCapacity &- 1 else { break }
      vectors[count] = iovec(iov_base: vector.start.map { $0 + skip }, iov_len: vector.length &- skip)
      skip = 0
      count &+= 1
    }
    return count
  }

  /// - Returns: false when the bytes make no sense.
  private func take(_ got: Int) -> Bool {
    var rest = got
    if receivingTag >= 0 {
      let data = min(rest, dataBytes(receivingTag) &- receivedBytes)
      receivedBytes &+= data
      rest &-= data
      if receivedBytes == dataBytes(receivingTag) {
        let tag = receivingTag
        receivingTag = -1
        answered(tag, receivedBytes)
      }
    }
    replyHeaderBytes &+= rest
    guard replyHeaderBytes == NBDProtocol.replyBytes else { return true }
    replyHeaderBytes = 0
    let magic = UInt32(bigEndian: replyHeader.load(as: UInt32.self))
    let error = UInt32(bigEndian: replyHeader.load(fromByteOffset: 4, as: UInt32.self))
    let handle = UInt64(bigEndian: replyHeader.load(fromByteOffset: 8, as: UInt64.self))
    let tag = Int(handle & 0xffff_ffff)
    guard magic == NBDProtocol.replyMagic, handle >> 32 == UInt64(generation), tag < depth,
      operations[tag].phase == .sent
    else { return false }
    if error != 0 {
      answered(tag, -NBDProtocol.errno(error))
    } else if operations[tag].request.operation == .read {
      receivingTag = tag
      receivedBytes = 0
    } else {
      answered(tag, operations[tag].flushingAfter >= 0 ? 0 : dataBytes(tag))
    }
    return true
  }

  /// Bytes of data of a read or write.
  func dataBytes(_ tag: Int) -> Int {
    let request = operations[tag].request
    guard request.operation == .read || request.operation == .write else { return 0 }
    var bytes = 0
    for index in 0..<request.vectorCount { bytes &+= request.vectors[index].length }
    return bytes
  }
}
