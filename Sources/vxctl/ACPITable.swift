import ArgumentParser
import Glibc
import Xen

/// `vxctl acpi-table`: the SSDT that tells an x86 HVM guest of its virtio-mmio slots.
struct ACPITable: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "acpi-table",
    abstract: "Write the ACPI table of the virtio-mmio slots, for acpi_firmware= in an xl configuration.",
    discussion: "vxd has to run with the same number of slots (vxd --slots).")

  @Option(
    help: "Number of slots, 1 to \(SlotTable.maximumCount) (default: \(SlotTable.defaultCount)).",
    transform: Value.number(1...SlotTable.maximumCount))
  var slots = SlotTable.defaultCount

  @Argument(help: "The file to write.", transform: Value.path)
  var file: String

  func run() throws {
    let table = SlotACPITable.compiled(slots: slots)
    guard let output = fopen(file, "we") else {
      perror("vxctl: \(file)")
      throw ExitCode(1)
    }
    let written = fwrite(table, 1, table.count, output)
    guard fclose(output) == 0, written == table.count else {
      perror("vxctl: \(file)")
      throw ExitCode(1)
    }
  }
}
