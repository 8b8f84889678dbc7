import Virtqueue

/// From a chain to the engine's requests.
extension BlockPump {
  /// Starts the request in a slot.
  ///
  /// - Returns: false when no bounce buffer is left.
  mutating func begin(_ slot: Int, _ chain: DescriptorChain) throws(VirtqueueFault) -> Bool {
    guard let statusAddress = BlockRequest.statusAddress(chain) else { throw .requestTooShort }
    slab.records[slot] = BlockOperationRecord(
      life: life, ticket: chain.ticket, statusAddress: statusAddress, readableCount: chain.readableCount,
      writableCount: chain.writableCount, written: 1)
    let request: BlockRequest
    do throws(GuestMemoryFault) {
      request = try BlockRequest.parse(chain, memory: &memory)
    } catch {
      return end(slot, .ioError)
    }
    slab.records[slot].dataBytes = request.dataBytes
    switch request.kind {
    case .read: return transfer(slot, .read, request)
    case .write: return transfer(slot, .write, request)
    case .flush:
      if settings.cache == .unsafe { return end(slot, .ok, as: .flush) }
      tally.flushes &+= 1
      slab.records[slot].kind = .flush
      slab.records[slot].dataBytes = 0
      start(slot)
    case .discard: return beginRanges(slot, .discard, isOffered: geometry.canDiscard)
    case .writeZeroes: return beginRanges(slot, .writeZeroes, isOffered: geometry.canWriteZeroes)
    case .secureErase: return beginRanges(slot, .secureErase, isOffered: geometry.canSecureErase)
    case .getID:
      guard admitSmall() else { return false }
      var identifier: (UInt64, UInt64, UInt32) = (0, 0, 0)
      withUnsafeMutableBytes(of: &identifier) { bytes in
        for index in 0..<serial.count { bytes[index] = serial[index] }
      }
      withUnsafeBytes(of: &identifier) { answer(slot, UnsafeRawBufferPointer(rebasing: $0[..<20])) }
    case .getLifetime:
      guard let lifetime = geometry.lifetime else { return end(slot, .unsupported, isOther: true) }
      guard admitSmall() else { return false }
      // struct virtio_blk_lifetime: pre_eol_info, device_lifetime_est_typ_a, device_lifetime_est_typ_b
      var words = (
        lifetime.preEndOfLife.littleEndian, lifetime.typicalA.littleEndian, lifetime.typicalB.littleEndian
      )
      withUnsafeBytes(of: &words) { answer(slot, UnsafeRawBufferPointer(rebasing: $0[..<6])) }
    case .unknown: return end(slot, .unsupported, isOther: true)
    }
    return true
  }

  /// Ends a request of which nothing is asked of the store. It has its rate all the same: a driver can make such requests without end.
  ///
  /// - Returns: false when its chain has to wait.
  private mutating func end(
    _ slot: Int, _ status: BlockStatus, as operation: BlockOperation? = nil, isOther: Bool = false
  ) -> Bool {
    guard admitSmall() else { return false }
    if let operation { tally(of: operation) }
    if isOther { tally.others &+= 1 }
    complete(slot, status)
    return true
  }

  private mutating func tally(of operation: BlockOperation) {
    switch operation {
    case .flush: tally.flushes &+= 1
    case .discard: tally.discards &+= 1
    case .writeZeroes: tally.writeZeroes &+= 1
    default: tally.others &+= 1
    }
  }

  /// Answers a request that asks for a few bytes of ours; a shorter buffer gets the first ones.
  private mutating func answer(_ slot: Int, _ bytes: UnsafeRawBufferPointer) {
    tally.others &+= 1
    guard let start = bytes.baseAddress else { return complete(slot, .ioError) }
    let record = slab.records[slot]
    var cursor = ChainCursor(slab.buffers(slot) + record.readableCount, count: record.writableCount)
    let room = Int(truncatingIfNeeded: min(record.dataBytes, UInt64(bytes.count)))
    do throws(GuestMemoryFault) {
      _ = try cursor.write(&memory, from: start, count: room)
    } catch {
      return complete(slot, .ioError)
    }
    slab.records[slot].written = UInt32(truncatingIfNeeded: room &+ 1)
    complete(slot, .ok)
  }

  // MARK: Reads and writes

  private mutating func transfer(_ slot: Int, _ operation: BlockOperation, _ request: BlockRequest) -> Bool {
    let block = UInt64(geometry.logicalBlock)
    guard BlockRequest.isOnDisk(sector: request.sector, bytes: request.dataBytes, capacity: geometry.capacity),
      request.dataBytes % block == 0,
      (request.sector &* BlockConfiguration.sectorSize) % block == 0, request.dataBytes < 1 << 31,
      operation == .read || !geometry.readOnly
    else { return end(slot, .ioError) }
    slab.records[slot].kind = operation
    slab.records[slot].offset = request.sector &* BlockConfiguration.sectorSize
    guard request.dataBytes > 0 else {
      // A multiple of 512 too (virtio 1.2, 5.2.6).
      return end(slot, .ok)
    }
    guard isLimited else { return startTransfer(slot) }
    if admit(slot), !startTransfer(slot) { throttle(slot) }
    return true
  }

  /// Starts a request without data of the guest's, or lets it wait for its rate.
  private mutating func start(_ slot: Int) { if !isLimited || admit(slot) { _ = startAdmitted(slot) } }

  /// Starts a request that its rate let through.
  ///
  /// - Returns: false when no bounce buffer is left.
  mutating func startAdmitted(_ slot: Int) -> Bool {
    switch slab.records[slot].kind {
    case .read, .write: return startTransfer(slot)
    case .flush: stage(slot, offset: 0, length: 0, vectorCount: 0)
    case .discard, .writeZeroes, .secureErase:
      unfinished.append(slot)
      goOn()
    }
    return true
  }

  /// The first step of a transfer that its rate let through.
  ///
  /// - Returns: false when no bounce buffer is left.
  mutating func startTransfer(_ slot: Int) -> Bool {
    let operation = slab.records[slot].kind
    let dataBytes = slab.records[slot].dataBytes
    if direct, dataBytes > directFrom {
      // As if there were no memory for its data: what is under way makes room.
      guard bytesInFlight < Self.bytesInFlightLimit || engineMovesData else { return false }
      if stageDirect(slot) {
        count(operation, dataBytes)
        return true
      }
    }
    guard takeBuffers(slot, dataBytes) else { return false }
    count(operation, dataBytes)
    stageTransfer(slot)
    return true
  }

  /// The next step of a request that has no bounce buffers yet: straight, or by some of those.
  mutating func stageStep(_ slot: Int) {
    if slab.records[slot].bufferCount == 0,
      !(direct && slab.records[slot].dataBytes > directFrom && stageDirect(slot))
    {
      guard takeBuffers(slot, slab.records[slot].dataBytes &- slab.records[slot].doneBytes) else {
        return unfinished.append(slot)
      }
    }
    if slab.records[slot].bufferCount > 0 { stageTransfer(slot) }
  }

  private mutating func stageDirect(_ slot: Int) -> Bool {
    guard let vectors = directVectors(slot) else { return false }
    let record = slab.records + slot
    stage(
      slot, offset: record.pointee.offset &+ record.pointee.doneBytes, length: record.pointee.stepBytes,
      vectorCount: vectors)
    return true
  }

  /// Stages what is left of requests that are worked on in steps, as far as the budget and what the engine may have at a time allow it.
  mutating func goOn() {
    guard heldResult == 0, orphans == 0 else { return }
    var left = unfinished.length
    while left > 0, let slot = unfinished.first, budget.allowsStep() {
      left &-= 1
      unfinished.removeFirst()
      switch slab.records[slot].kind {
      case .read, .write: stageStep(slot)
      default: if rangesInFlight < Self.rangesInFlightLimit { stageRange(slot) } else { unfinished.append(slot) }
      }
    }
    submit()
  }

  private mutating func count(_ operation: BlockOperation, _ bytes: UInt64) {
    if operation == .read {
      tally.reads &+= 1
      tally.readBytes &+= bytes
    } else {
      tally.writes &+= 1
      tally.writtenBytes &+= bytes
    }
  }

  /// Bounce buffers for the first step: as many as the data needs, or as many as there are.
  private mutating func takeBuffers(_ slot: Int, _ bytes: UInt64) -> Bool {
    let numbers = slab.bounce(slot)
    var taken = 0
    var rest = bytes
    while rest > 0, taken < OperationSlab.buffersPerStep, let buffer = bounce.take(bytes: rest) {
      numbers[taken] = buffer
      taken &+= 1
      rest &-= min(rest, UInt64(bounce.bytes(buffer)))
    }
    slab.records[slot].bufferCount = taken
    return taken > 0
  }

  /// The guest's data buffers of the next step as vectors, when the engine can use all of them; the step's bytes are noted.
  private mutating func directVectors(_ slot: Int) -> Int? {
    let vectors = slab.vectors(slot)
    var count = 0
    let record = slab.records + slot
    // Mostly there is one buffer for the data, behind a header in one of its own.
    if let buffer = onlyBuffer(slot), record.pointee.dataBytes <= Self.stepBytes, record.pointee.doneBytes == 0 {
      record.pointee.stepBytes = record.pointee.dataBytes
      let bytes = Int(truncatingIfNeeded: record.pointee.dataBytes)
      guard let (pointer, length) = try? memory.translate(buffer.pointee.address, bytes) else { return nil }
      if length == bytes {
        guard (UInt64(UInt(bitPattern: pointer)) | UInt64(length)) & alignmentMask == 0 else { return nil }
        vectors[0] = DataVector(start: pointer, length: length)
        return 1
      }
    }
    var cursor = dataCursor(slot)
    if record.pointee.doneBytes > 0 { cursor.skip(record.pointee.doneBytes) }
    var rest = min(record.pointee.dataBytes &- record.pointee.doneBytes, Self.stepBytes)
    record.pointee.stepBytes = rest
    while rest > 0, let run = cursor.take(Int(truncatingIfNeeded: rest)) {
      var done: UInt32 = 0
      while done < run.length {
        guard count < slab.chainLimit else { return nil }
        guard
          let (pointer, length) = try? memory.translate(
            run.address &+ UInt64(done), Int(run.length &- done)),
          (UInt64(UInt(bitPattern: pointer)) | UInt64(length)) & alignmentMask == 0
        else { return nil }
        vectors[count] = DataVector(start: pointer, length: length)
        count &+= 1
        done &+= UInt32(truncatingIfNeeded: length)
      }
      rest &-= UInt64(run.length)
    }
    return count
  }

  /// The buffer that holds all data of a request and begins with it; nil when there is none such.
  @inline(__always)
  private mutating func onlyBuffer(_ slot: Int) -> UnsafeMutablePointer<GuestBuffer>? {
    let record = slab.records + slot
    var buffer = slab.buffers(slot)
    if record.pointee.kind == .read {
      buffer += record.pointee.readableCount
    } else {
      guard record.pointee.readableCount > 1, buffer.pointee.length == UInt32(BlockRequest.headerBytes) else {
        return nil
      }
      buffer += 1
    }
    return UInt64(buffer.pointee.length) >= record.pointee.dataBytes ? buffer : nil
  }

  /// A cursor over the data of a request: behind the header of a write, before the status byte of a read.
  mutating func dataCursor(_ slot: Int) -> ChainCursor {
    let record = slab.records + slot
    let buffers = slab.buffers(slot)
    if record.pointee.kind == .read {
      return ChainCursor(buffers + record.pointee.readableCount, count: record.pointee.writableCount)
    }
    var cursor = ChainCursor(buffers, count: record.pointee.readableCount)
    cursor.skip(UInt64(BlockRequest.headerBytes))
    return cursor
  }

  /// One step of a transfer through the bounce buffers of its slot.
  mutating func stageTransfer(_ slot: Int) {
    let record = slab.records + slot
    let numbers = slab.bounce(slot)
    let vectors = slab.vectors(slot)
    var rest = record.pointee.dataBytes &- record.pointee.doneBytes
    var count = 0
    var cursor = dataCursor(slot)
    let copies = record.pointee.kind == .write
    if copies { cursor.skip(record.pointee.doneBytes) }
    record.pointee.stepBytes = 0
    while count < record.pointee.bufferCount, rest > 0 {
      let start = bounce.start(numbers[count])
      let length = Int(truncatingIfNeeded: min(rest, UInt64(bounce.bytes(numbers[count]))))
      if copies {
        do throws(GuestMemoryFault) {
          _ = try cursor.read(&memory, to: start, count: length)
        } catch {
          return complete(slot, .ioError)
        }
      }
      vectors[count] = DataVector(start: start, length: length)
      rest &-= UInt64(length)
      record.pointee.stepBytes &+= UInt64(length)
      count &+= 1
    }
    stage(
      slot, offset: record.pointee.offset &+ record.pointee.doneBytes, length: record.pointee.stepBytes,
      vectorCount: count)
  }

  // MARK: Ranges

  /// Discard, write zeroes, secure erase: each range becomes a step of its own.
  ///
  /// - Returns: false when its chain has to wait.
  private mutating func beginRanges(_ slot: Int, _ operation: BlockOperation, isOffered: Bool) -> Bool {
    let dataBytes = slab.records[slot].dataBytes
    let count = Int(truncatingIfNeeded: min(dataBytes / 16, UInt64(BlockConfiguration.rangesMaximum) + 1))
    guard dataBytes % 16 == 0, count > 0, count <= BlockConfiguration.rangesMaximum, !geometry.readOnly else {
      return end(slot, .ioError, as: operation)
    }
    guard isOffered else { return end(slot, .unsupported, as: operation) }
    slab.records[slot].kind = operation
    var cursor = dataCursor(slot)
    var written: UInt64 = 0
    for index in 0..<count {
      // struct virtio_blk_discard_write_zeroes: sector u64, num_sectors u32, flags u32
      var words: (UInt64, UInt64) = (0, 0)
      var fault = false
      withUnsafeMutableBytes(of: &words) { bytes in
        guard let start = bytes.baseAddress else { return }
        do throws(GuestMemoryFault) {
          fault = try cursor.read(&memory, to: start, count: 16) != 16
        } catch {
          fault = true
        }
      }
      let sector = UInt64(littleEndian: words.0)
      let second = UInt64(littleEndian: words.1)
      let sectors = UInt32(truncatingIfNeeded: second)
      let flags = UInt32(truncatingIfNeeded: second >> 32)
      // The flag UNMAP belongs to write zeroes alone; unknown ones are refused (virtio 1.2, 5.2.6.2).
      guard flags & ~(operation == .writeZeroes ? 1 : 0) == 0 else { return end(slot, .unsupported, as: operation) }
      let bytes = UInt64(sectors) &* BlockConfiguration.sectorSize
      guard !fault, sectors <= BlockConfiguration.rangeSectorsMaximum,
        BlockRequest.isOnDisk(sector: sector, bytes: bytes, capacity: geometry.capacity)
      else { return end(slot, .ioError, as: operation) }
      let mayUnmap = flags & 1 == 1 && geometry.canUnmapZeroes
      if operation == .writeZeroes, !mayUnmap { written &+= bytes }
      slab.ranges(slot)[index] = OperationSlab.Range(
        offset: sector &* BlockConfiguration.sectorSize, length: bytes, mayUnmap: mayUnmap)
    }
    slab.records[slot].rangeCount = count
    // What a limit sees of it: bytes where the store has to write them.
    slab.records[slot].dataBytes = written
    tally(of: operation)
    start(slot)
    return true
  }

  /// Stages the next piece of a request that names ranges. Pieces end where multiples of their size lie on the disk, so that a store that
  /// discards in large units loses none of them.
  private mutating func stageRange(_ slot: Int) {
    // By pointers of their own, see `Virtqueue.claim`.
    let (record, ranges) = (slab.records + slot, slab.ranges(slot))
    let range = ranges[record.pointee.nextRange]
    let unit = record.pointee.kind == .writeZeroes ? Self.zeroBytes : Self.discardBytes
    record.pointee.stepBytes = min(range.length, unit &- range.offset % unit)
    stage(slot, offset: range.offset, length: record.pointee.stepBytes, vectorCount: 0, mayUnmap: range.mayUnmap)
    // Durable when the last piece is: that covers those before it.
    let isLast = range.length == record.pointee.stepBytes && record.pointee.nextRange &+ 1 == record.pointee.rangeCount
    if !isLast { staged[stagedCount &- 1].isDurable = false }
  }

  /// The piece that was staged last is done.
  mutating func advanceRange(_ slot: Int) {
    let (record, ranges) = (slab.records + slot, slab.ranges(slot))
    let index = record.pointee.nextRange
    ranges[index].offset &+= record.pointee.stepBytes
    ranges[index].length &-= record.pointee.stepBytes
    if ranges[index].length == 0 { record.pointee.nextRange &+= 1 }
  }
}
