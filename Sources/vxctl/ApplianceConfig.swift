import ArgumentParser
import ControlAPI
import Glibc

/// `vxctl appliance-config OUTPUT`: the configuration of a driver domain that has no disk, as an image for its disk xvdz.
struct ApplianceConfig: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "appliance-config",
    abstract: "Make the configuration image for the appliance, a driver domain without a disk.",
    discussion: """
      Give the image to the domain as its disk xvdz; it reads it when it starts. The same options always give the same image. This command \
      only checks that the profiles are JSON; 'vxctl config check' checks them fully, also with --domain.
      """)

  @Option(help: "Profiles of guests and devices, as in /etc/vxd/profiles.json.", transform: Value.path)
  var profiles: String?
  @Option(
    help:
      "A bridge and its ports: br0=eth0 or br0=eth0,eth1; br1= is a bridge without ports. Without this option, each network device gets a bridge (br0 for eth0).",
    transform: Setting.value
  )
  var bridge: [Setting] = []
  @Option(help: "An address of the domain, for disks over NBD: br0=192.0.2.7/24.", transform: Setting.value)
  var address: [Setting] = []
  @Option(help: "The domain's gateway: 192.0.2.1.", transform: Value.text("an address such as 192.0.2.1"))
  var gateway: String?
  @Option(
    help: "Mount an ext4 file system that holds images: xvdb=/srv, or read-only xvdb1=/srv,ro.",
    transform: Setting.value)
  var mount: [Setting] = []
  @Argument(
    help: "The image file to write, or - for standard output.",
    transform: Value.text("a path, or - for standard output"))
  var output: String

  /// NAME=VALUE.
  struct Setting: CommandValue, Equatable {
    static let expected = "NAME=VALUE"

    let name: String
    let value: String

    init?(argument: String) {
      guard let sign = argument.firstIndex(of: "=") else { return nil }
      name = String(argument[..<sign])
      value = String(argument[argument.index(after: sign)...])
    }
  }

  /// Init reads these lines with a shell's words: nothing else may be in them.
  private static func consists(_ text: String, of more: String, upTo limit: Int) -> Bool {
    !text.isEmpty && text.utf8.count <= limit
      && text.utf8.allSatisfy {
        (0x30...0x39).contains($0) || (0x41...0x5a).contains($0) || (0x61...0x7a).contains($0) || more.utf8.contains($0)
      }
  }

  private static func isDevice(_ name: String) -> Bool {
    consists(name, of: "._-", upTo: 15) && !name.hasPrefix("-") && name != "." && name != ".."
  }

  /// The lines of `network`.
  func networkLines() throws -> [String] {
    var lines: [String] = []
    for setting in bridge {
      let ports = setting.value.split(separator: ",", omittingEmptySubsequences: true).map(String.init)
      guard Self.isDevice(setting.name), ports.allSatisfy(Self.isDevice) else {
        throw ValidationError("--bridge '\(setting.name)=\(setting.value)': expected BRIDGE=PORT,PORT")
      }
      lines.append((["bridge", setting.name] + ports).joined(separator: " "))
    }
    for setting in address {
      let parts = setting.value.split(separator: "/", omittingEmptySubsequences: false).map(String.init)
      guard Self.isDevice(setting.name), parts.count == 2, Self.consists(parts[0], of: ".:", upTo: 45),
        Int(parts[1]).map({ (1...128).contains($0) }) == true
      else { throw ValidationError("--address '\(setting.name)=\(setting.value)': expected DEVICE=ADDRESS/LENGTH") }
      lines.append("address \(setting.name) \(parts.joined(separator: "/"))")
    }
    if let gateway {
      guard Self.consists(gateway, of: ".:", upTo: 45) else {
        throw ValidationError("--gateway '\(gateway)': expected an address")
      }
      lines.append("gateway \(gateway)")
    }
    // An address alone needs a device to be on: without bridges of its own, the domain's usual ones are not made.
    guard lines.isEmpty || !bridge.isEmpty else {
      throw ValidationError("--address and --gateway: also give the bridges, with --bridge")
    }
    return lines
  }

  /// The lines of `mounts`.
  func mountLines() throws -> [String] {
    try mount.map { setting in
      let isReadOnly = setting.value.hasSuffix(",ro")
      let path = isReadOnly ? String(setting.value.dropLast(3)) : setting.value
      guard Self.isDevice(setting.name), path.hasPrefix("/"), path.count > 1,
        Self.consists(path, of: "/._-", upTo: 255),
        !path.split(separator: "/").contains("..")
      else {
        throw ValidationError("--mount '\(setting.name)=\(setting.value)': expected DEVICE=/PATH or DEVICE=/PATH,ro")
      }
      return "\(setting.name) \(path) \(isReadOnly ? "ro" : "rw")"
    }
  }

  func validate() throws {
    _ = try networkLines()
    _ = try mountLines()
  }

  func run() throws {
    var files: [(name: String, contents: [UInt8])] = []
    if let profiles {
      let text = try readText(profiles)
      do throws(JSONText.Fault) { _ = try JSONText.parse(text) } catch {
        throw ValidationError("'\(profiles)' is not JSON: \(error.message)")
      }
      files.append(("profiles.json", text))
    }
    for (name, lines) in [("network", try networkLines()), ("mounts", try mountLines())] where !lines.isEmpty {
      files.append((name, Array((lines.joined(separator: "\n") + "\n").utf8)))
    }
    let image = Self.archive(files)
    guard output != "-" else {
      var left = image[...]
      while !left.isEmpty {
        let count = left.withUnsafeBytes { write(1, $0.baseAddress, $0.count) }
        guard count > 0 else { throw ValidationError("cannot write: \(String(cString: strerror(errno)))") }
        left = left.dropFirst(count)
      }
      return
    }
    // The old one may be the disk of a domain that runs, which keeps what it has.
    let part = output + ".part"
    guard let file = fopen(part, "we") else {
      throw ValidationError("cannot write '\(part)': \(String(cString: strerror(errno)))")
    }
    let written = image.withUnsafeBytes { fwrite($0.baseAddress, 1, $0.count, file) }
    guard fclose(file) == 0, written == image.count, rename(part, output) == 0 else {
      let reason = String(cString: strerror(errno))
      unlink(part)
      throw ValidationError("cannot write '\(output)': \(reason)")
    }
  }

  /// A tar archive (POSIX.1-1988, ustar) of regular files of root's, padded to whole pieces of 64 KiB, as a disk.
  static func archive(_ files: [(name: String, contents: [UInt8])]) -> [UInt8] {
    var image: [UInt8] = []
    for file in files {
      var header = [UInt8](repeating: 0, count: 512)
      func put(_ text: String, at place: Int) {
        for (offset, byte) in text.utf8.enumerated() { header[place + offset] = byte }
      }
      func octal(_ number: Int, _ digits: Int) -> String {
        let text = String(number, radix: 8)
        return String(repeating: "0", count: max(0, digits - text.count)) + text
      }
      put(file.name, at: 0)
      put(octal(0o600, 7), at: 100)
      put(octal(0, 7), at: 108)
      put(octal(0, 7), at: 116)
      put(octal(file.contents.count, 11), at: 124)
      put(octal(0, 11), at: 136)
      put("        0", at: 148)  // The sum counts its own field as spaces; then the type of a regular file.
      put("ustar", at: 257)
      put("00", at: 263)
      put(octal(header.reduce(0) { $0 + Int($1) }, 6), at: 148)
      header[154] = 0
      image += header + file.contents
      image += [UInt8](repeating: 0, count: (512 - file.contents.count % 512) % 512)
    }
    image += [UInt8](repeating: 0, count: 1024)
    return image + [UInt8](repeating: 0, count: (65536 - image.count % 65536) % 65536)
  }
}
