import Glibc
import Testing
import Xen

@Suite struct SlotTableTests {
  @Test func everySlotHasAnInterruptOfItsOwn() {
    var seen: Set<Int> = []
    for index in 0..<SlotTable.maximumCount {
      let slot = SlotTable.slot(index)
      guard case .pciIntx(let device, let pin) = slot.interrupt else {
        Issue.record("slot \(index) has no INTx")
        continue
      }
      #expect((24...31).contains(device))
      #expect(pin < 4)
      // xen: hvm_pci_intx_gsi
      #expect(16 + (((Int(device) << 2) + (Int(device) >> 3) + Int(pin)) & 31) == SlotTable.gsi(slot: index))
      #expect((16...47).contains(SlotTable.gsi(slot: index)))
      seen.insert(SlotTable.gsi(slot: index))
    }
    #expect(seen.count == SlotTable.maximumCount)
  }

  @Test func windowsLieBelowTheIOAPIC() {
    for index in 0..<SlotTable.maximumCount {
      let base = SlotTable.slot(index).base
      #expect(base >= 0xfeb0_0000 && base + 0x200 <= 0xfec0_0000)
    }
  }

  @Test func compiledTableIsTheInstalledOne() throws {
    let path = #filePath.split(separator: "/").dropLast(3).map { "/" + $0 }.joined() + "/deploy/acpi/slots.aml"
    let file = try #require(fopen(path, "re"))
    defer { fclose(file) }
    var bytes = [UInt8](repeating: 0, count: 8192)
    let count = fread(&bytes, 1, bytes.count, file)
    #expect(Array(bytes[..<count]) == SlotACPITable.compiled(slots: SlotTable.defaultCount))
  }

  @Test(arguments: [1, 2, 8, 15, 16, 17, 32]) func tablesOfAnySizeHaveTheirLengthAndChecksum(slots: Int) {
    let table = SlotACPITable.compiled(slots: slots)
    let length = (0..<4).reduce(0) { $0 | Int(table[4 + $1]) << (8 * $1) }
    #expect(length == table.count)
    #expect(table.reduce(0) { ($0 + Int($1)) & 0xff } == 0)
  }
}
