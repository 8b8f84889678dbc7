/*
 * The virtio-mmio slots of vxd for an x86 HVM guest: passed to the guest by acpi_firmware= in its xl configuration.
 * Linux's virtio_mmio driver binds to LNRO0005. Windows and interrupts are those of Sources/Backends/Xen/SlotTable.swift;
 * `vxctl acpi-table` writes the same table for other numbers of slots.
 *
 * Compile with: iasl -p slots slots.asl
 */
DefinitionBlock ("slots.aml", "SSDT", 2, "VXD", "VXDSLOTS", 0x00000001)
{
    Scope (\_SB)
    {
        Device (VX00)
        {
            Name (_HID, "LNRO0005")
            Name (_UID, 0x00)
            Name (_CRS, ResourceTemplate ()
            {
                Memory32Fixed (ReadWrite, 0xFEB00000, 0x00000200)
                Interrupt (ResourceConsumer, Level, ActiveLow, Shared) { 47 }
            })
        }
        Device (VX01)
        {
            Name (_HID, "LNRO0005")
            Name (_UID, 0x01)
            Name (_CRS, ResourceTemplate ()
            {
                Memory32Fixed (ReadWrite, 0xFEB01000, 0x00000200)
                Interrupt (ResourceConsumer, Level, ActiveLow, Shared) { 43 }
            })
        }
        Device (VX02)
        {
            Name (_HID, "LNRO0005")
            Name (_UID, 0x02)
            Name (_CRS, ResourceTemplate ()
            {
                Memory32Fixed (ReadWrite, 0xFEB02000, 0x00000200)
                Interrupt (ResourceConsumer, Level, ActiveLow, Shared) { 39 }
            })
        }
        Device (VX03)
        {
            Name (_HID, "LNRO0005")
            Name (_UID, 0x03)
            Name (_CRS, ResourceTemplate ()
            {
                Memory32Fixed (ReadWrite, 0xFEB03000, 0x00000200)
                Interrupt (ResourceConsumer, Level, ActiveLow, Shared) { 35 }
            })
        }
        Device (VX04)
        {
            Name (_HID, "LNRO0005")
            Name (_UID, 0x04)
            Name (_CRS, ResourceTemplate ()
            {
                Memory32Fixed (ReadWrite, 0xFEB04000, 0x00000200)
                Interrupt (ResourceConsumer, Level, ActiveLow, Shared) { 31 }
            })
        }
        Device (VX05)
        {
            Name (_HID, "LNRO0005")
            Name (_UID, 0x05)
            Name (_CRS, ResourceTemplate ()
            {
                Memory32Fixed (ReadWrite, 0xFEB05000, 0x00000200)
                Interrupt (ResourceConsumer, Level, ActiveLow, Shared) { 27 }
            })
        }
        Device (VX06)
        {
            Name (_HID, "LNRO0005")
            Name (_UID, 0x06)
            Name (_CRS, ResourceTemplate ()
            {
                Memory32Fixed (ReadWrite, 0xFEB06000, 0x00000200)
                Interrupt (ResourceConsumer, Level, ActiveLow, Shared) { 19 }
            })
        }
        Device (VX07)
        {
            Name (_HID, "LNRO0005")
            Name (_UID, 0x07)
            Name (_CRS, ResourceTemplate ()
            {
                Memory32Fixed (ReadWrite, 0xFEB07000, 0x00000200)
                Interrupt (ResourceConsumer, Level, ActiveLow, Shared) { 46 }
            })
        }
    }
}
